"""The official client and curl against a real socket: answers are the offline engine's."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from served import KEY, until

import specmoe_jax as sm
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.incremental_text import IncrementalText

MESSAGES = [{"role": "user", "content": "hello"}]
IDS = tuple(b"<user>hello>")
DRAWN = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


def streamed(model, completion, prompt, stop=()):
    """The text as a stream shows it; random bytes are no UTF-8, so it may differ from the text at the end."""
    shown = IncrementalText(model, stop, prompt)
    head = [TokenEvent(0, (token,), None, 0.0) for token in completion.token_ids[:-1]]
    return "".join(map(shown.push, [*head, TokenEvent(0, completion.token_ids[-1:], completion, 0.0)]))


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_chat(client, offline):
    (want,) = offline([IDS], sm.SamplingParams(max_new_tokens=9))
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9, temperature=0)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (want.text, want.finish_reason)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(IDS), len(want.token_ids))


def test_a_stream_of_several_drawn_answers(client, chat_model, offline):
    want = offline([IDS] * 2, sm.SamplingParams(max_new_tokens=9, **DRAWN))
    how = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 9, "logprobs": True} | DRAWN
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, top_logprobs=2, **how):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [streamed(chat_model, one, IDS) for one in want]
    assert reasons == [one.finish_reason for one in want] and want[0].token_ids != want[1].token_ids
    assert usage.completion_tokens == sum(len(one.token_ids) for one in want)
    assert [len(own) for own in tokens] == [len(one.token_ids) for one in want]
    assert all(len(token.top_logprobs) == 2 for own in tokens for token in own)


def test_completions_with_logprobs_and_stop(client, chat_model, offline):
    params = sm.SamplingParams(max_new_tokens=12, logprobs=2)
    (free,) = offline(["some text"], params)
    stop = free.text[4:6]
    (want,) = offline(["some text"], sm.SamplingParams(max_new_tokens=12, logprobs=2, stop=(stop,)))
    assert want.finish_reason == "stop" and len(want.token_ids) < 12
    how = {"model": "tiny", "temperature": 0, "max_tokens": 12, "logprobs": 2, "stop": stop}
    (choice,) = client.completions.create(prompt="some text", **how).choices
    assert (choice.text, choice.finish_reason) == (want.text, "stop")
    np.testing.assert_allclose(choice.logprobs.token_logprobs, [token.logprob for token in want.logprobs], atol=1e-5)
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * len(want.token_ids)
    pieces = client.completions.create(prompt="some text", stream=True, **how)
    text = "".join(choice.text for chunk in pieces for choice in chunk.choices)
    assert text == streamed(chat_model, want, "some text", (stop,))


def test_several_prompts_and_token_ids(client, offline):
    want = offline([[1, 2, 3], [4, 5]], sm.SamplingParams(max_new_tokens=5, **DRAWN))
    found = client.completions.create(model="tiny", prompt=[[1, 2, 3], [4, 5]], max_tokens=5, **DRAWN)
    assert [choice.text for choice in found.choices] == [one.text for one in want]


def test_models_and_errors(client):
    openai = pytest.importorskip("openai")
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_client_that_goes_away_frees_its_rows(client, served, monkeypatch):
    step, ended = served.service.step, served.runner.figures.ended
    monkeypatch.setattr(served.service, "step", lambda: (until_told(), step())[1])

    def until_told():
        import time

        time.sleep(0.02)  # else the answer is complete before anybody can leave

    before = ended["cancelled"]
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=70, stream=True, n=2, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert served.service.running.requests + served.service.running.waiting == 2
    stream.close()
    until(lambda: served.service.running == (0, 0))
    assert ended["cancelled"] == before + 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(served, offline, chat_model):
    def curl(path, *options):
        command = ["curl", "-sSN", "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", *options]
        return subprocess.run([*command, served.url + path], capture_output=True, text=True, timeout=60, check=True).stdout

    (want,) = offline([IDS], sm.SamplingParams(max_new_tokens=6))
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    found = json.loads(curl("/v1/chat/completions", "-d", json.dumps(body)))
    assert found["choices"][0]["message"]["content"] == want.text
    lines = curl("/v1/chat/completions", "-d", json.dumps(body | {"stream": True})).split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "data: [DONE]" in lines
    deltas = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == streamed(chat_model, want, IDS)
    assert json.loads(curl("/health"))["status"] == "ok"
    assert "specmoe_requests_total" in curl("/metrics") and "v1/chat/completions" in curl("/")
