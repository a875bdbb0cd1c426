"""The chat page in a headless browser, against a running server. Needs chromium with its driver, and selenium."""

import shutil

import pytest
from served import KEY, until

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        self.fill("temperature", "0")
        self.fill("tokens", "12")
        self.fill("key", KEY)

    def at(self, name: str):
        return self.browser.find_element("id", name)

    def fill(self, name: str, text: str) -> None:
        self.at(name).clear()
        self.at(name).send_keys(text)

    def send(self, text: str) -> None:
        self.at("text").send_keys(text, "\n")

    def ask(self, text: str) -> None:
        self.send(text)
        until(lambda: self.at("send").text == "Send")

    def shown(self, kind: str) -> list[str]:
        """As the document has it: a browser's own rendering leaves out white space and characters that it cannot draw."""
        boxes = self.browser.find_elements("class name", kind)
        return [self.browser.execute_script("return arguments[0].textContent", box) for box in boxes]


@pytest.fixture(scope="module")
def browser():
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    own = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield own
    own.quit()


@pytest.fixture
def page(browser, served):
    return Page(browser, served.url)


def answer(served, *messages: str) -> str:
    """The API's, of a conversation in which people and model take turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    body = {"messages": turns, "temperature": 0, "max_tokens": 12}
    return served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_a_conversation(page, served):
    page.ask("abc")
    assert page.at("model").text == "tiny"
    first = answer(served, "abc")
    assert page.shown("assistant") == [first] and first
    page.ask("<b>de</b>")
    assert page.shown("user") == ["abc", "<b>de</b>"]
    assert page.shown("assistant") == [first, answer(served, "abc", first, "<b>de</b>")]
    page.at("new").click()
    assert page.shown("user") == page.shown("assistant") == []
    page.ask("abc")
    assert page.shown("assistant") == [first]  # nothing of the chat before


def test_what_the_server_refuses_is_shown_and_forgotten(page, served):
    page.ask("no!")
    assert page.shown("assistant") == [] and len(page.shown("error")) == 1 and "no shouting" in page.shown("error")[0]
    page.fill("key", "another")
    page.ask("abc")
    assert len(page.shown("error")) == 2 and "key" in page.shown("error")[1]
    page.fill("key", KEY)
    page.ask("abc")
    assert page.shown("assistant") == [answer(served, "abc")]


def test_stop_ends_the_request(page, served):
    page.fill("tokens", "70")
    page.send("abc")
    until(lambda: any(page.shown("assistant")))
    page.at("send").click()
    until(lambda: page.at("send").text == "Send")
    until(lambda: served.service.running == (0, 0))
    page.fill("tokens", "12")
    stopped = page.shown("assistant")[0]
    whole = served.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}], "temperature": 0, "max_tokens": 70}
    )
    assert whole.json()["choices"][0]["message"]["content"].startswith(stopped.rstrip("\ufffd"))
