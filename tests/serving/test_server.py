"""What a server refuses, by which status and in whose words; what it counts; and the job behind the requests."""

import contextlib
import json
import socket

import httpx
import pytest
from served import KEY, serving, until

import specmoe_jax as sm
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.serving.background import BackgroundJob

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        (CHAT, HELLO | {"tempreature": 1}, 400, "tempreature", "'tempreature' is not known here; known are"),
        (TEXT, {"prompt": "a", "messages": []}, 400, "messages", "not known"),
        (CHAT, {"max_tokens": 2}, 400, "messages", "messages is missing"),
        (TEXT, {}, 400, "prompt", "prompt is missing"),
        (CHAT, HELLO | {"messages": []}, 400, "messages", "at least one message"),
        (CHAT, HELLO | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "no text"),
        (CHAT, HELLO | {"messages": [{"role": "user", "content": "no!"}]}, 400, "messages", "no shouting"),
        (CHAT, HELLO | {"temperature": -1}, 400, "temperature", "temperature is -1"),
        (CHAT, HELLO | {"temperature": 0, "top_p": 0.5}, 400, "top_p", "top_k and top_p have no effect"),
        (CHAT, HELLO | {"top_logprobs": 2}, 400, "top_logprobs", "without logprobs=true"),
        (CHAT, HELLO | {"max_completion_tokens": 3}, 400, "max_completion_tokens", "says 3 and another field 2"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, 400, "response_format", "response_format is"),
        (CHAT, HELLO | {"regex": 3}, 400, "regex", "regex is 3"),
        (CHAT, HELLO | {"regex": "a("}, 400, "regex", "unclosed group|needs the library"),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, 400, "tools", "built is"),
        (CHAT, HELLO | {"stream_options": {"include_usage": True}}, 400, "stream_options", "without stream=true"),
        (CHAT, HELLO | {"n": 5}, 400, "n", "more than 4 answers"),
        (CHAT, HELLO | {"model": "other"}, 404, "model", "is not served here"),
        (CHAT, HELLO | {"max_tokens": 70}, 400, "messages", "prompt and answer together may have 80"),
        (TEXT, {"prompt": [1, 999], "max_tokens": 1}, 400, None, "outside 0..262"),
        (TEXT, {"prompt": ""}, 400, "prompt", "none of them empty"),
        (TEXT, {"prompt": "a", "stop": [""]}, 400, "stop", "none of them empty"),
        (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        (TEXT, {"prompt": "a", "logprobs": True}, 400, "logprobs", "0 to 20"),
        (TEXT, b'{"prompt": "\\ud800"}', 400, "prompt", "surrogate"),
        (TEXT, b'{"prompt": ', 400, None, "not JSON"),
        (TEXT, b'{"prompt": NaN}', 400, None, "not JSON"),
        (TEXT, b"[" * 10_000, 400, None, "not JSON"),
        (TEXT, b"[1]", 400, None, "must be a JSON object"),
        (TEXT, b'"' + b"a" * 30_000 + b'"', 413, None, "more than 20000 bytes"),
    ],
    ids=str,
)
@pytest.mark.every_case
def test_refusals_name_what_is_wrong(served, path, body, status, param, said):
    answer = served.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
    assert any(part in error["message"] for part in said.split("|")), error["message"]


def test_keys_hosts_kinds_and_paths(served):
    assert served.post(CHAT, HELLO, headers={"Authorization": "Bearer no"}).status_code == 401
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(served.url + path).status_code == 401
    assert httpx.get(served.url + "/health").json()["status"] == "ok"
    assert "Content-Security-Policy" in httpx.get(served.url + "/").headers
    assert httpx.get(served.url + "/v1/models", headers={"Host": "evil.example"}).status_code == 400
    plain = httpx.post(served.url + CHAT, content="{}", headers={"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"})
    assert plain.status_code == 415 and "application/json" in plain.json()["error"]["message"]
    missing = httpx.get(served.url + "/v2/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"
    assert httpx.get(served.url + CHAT).status_code == 405


def test_null_is_as_if_left_out(served):
    body = HELLO | {"temperature": 0, "stop": None, "logit_bias": None, "response_format": {"type": "text"}, "user": "me"}
    assert served.post(CHAT, body).status_code == 200


def test_answers_that_a_schema_describes(served):
    pytest.importorskip("llguidance")
    schema = {"enum": ["ja", "nein"]}  # without places for white space, of which a random model gives any amount
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    for extra, wanted in ((form, schema["enum"]), ({"regex": '"(yes|no)"'}, ["yes", "no"])):
        (choice,) = served.post(CHAT, HELLO | extra | {"max_tokens": 40, "temperature": 0}).json()["choices"]
        assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) in wanted


def test_a_body_of_no_stated_length_is_cut_off(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as own:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        own.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        piece = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
        with contextlib.suppress(ConnectionError):  # the server may have answered and gone before all of it was sent
            for _ in range(8):
                own.sendall(piece)
        assert b"413" in own.recv(100)


def test_metrics_count(served):
    before = served.runner.figures.ended["length"]
    assert served.post(CHAT, HELLO | {"ignore_eos": True}).status_code == 200
    text = httpx.get(served.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert f'specmoe_requests_total{{finish_reason="length"}} {before + 1}' in text
    assert "specmoe_time_to_first_token_seconds_bucket" in text and "specmoe_requests_waiting 0" in text


@pytest.fixture(scope="module")
def one_row(chat_model):
    """A server of one row whose queue has one place, and a step that waits for a word."""
    plan = sm.PRESETS["resident"](chat_model.config).replace(batch_size=1, deterministic_sampling=True)
    with serving(sm.Engine(chat_model, plan), max_waiting=1) as found:
        yield found


def test_a_full_queue_says_when_to_come_again(one_row, monkeypatch):
    import threading

    go, step = threading.Event(), one_row.service.step
    monkeypatch.setattr(one_row.service, "step", lambda: (go.wait(), step())[1])
    body = {"prompt": "a", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    waiting = [threading.Thread(target=one_row.post, args=(TEXT, body)) for _ in range(1)]
    for thread in waiting:
        thread.start()
    until(lambda: one_row.service.running.waiting == 1)
    refused = one_row.post(TEXT, body)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    go.set()
    for thread in waiting:
        thread.join()
    assert one_row.runner.figures.rejected == 1


def test_a_job_behind_requests_has_the_records_of_a_job_alone(one_row, chat_model, tmp_path):
    params = sm.SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=0.7, seed=3)
    prompts = [Prompt(f"p{i}", f"text {i}", params) for i in range(5)] + [
        Prompt("bad", "", params),
        Prompt("long", "b" * 85, params),
    ]
    want = sm.Engine(chat_model, one_row.engine.plan).generate([prompt.text for prompt in prompts[:5]], params)
    job = BackgroundJob(one_row.engine, one_row.runner, prompts, str(tmp_path / "o.jsonl"), restart=False)
    job.start()
    assert one_row.post(TEXT, {"prompt": "me first", "max_tokens": 3}).status_code == 200
    until(lambda: job.done == 7)
    job.stop()
    records = {json.loads(line)["id"]: json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()}
    assert [tuple(records[f"p{i}"]["token_ids"]) for i in range(5)] == [one.token_ids for one in want]
    assert [records[name]["finish_reason"] for name in ("bad", "long")] == ["error", "error"] and job.failed == 2
    again = BackgroundJob(one_row.engine, one_row.runner, prompts, str(tmp_path / "o.jsonl"), restart=False)
    assert again.done == 7
    again.start()
    again.stop()


def test_a_failing_step_is_told_and_survived(one_row, monkeypatch):
    from specmoe_jax.engine.service.service import Service

    with monkeypatch.context() as patch:
        patch.setattr(Service, "_counted_step", lambda *_: (_ for _ in ()).throw(RuntimeError("no link")))
        answer = one_row.post(TEXT, {"prompt": "a", "max_tokens": 3})
    assert answer.status_code == 500 and "no link" in answer.json()["error"]["message"]
    assert one_row.post(TEXT, {"prompt": "a", "max_tokens": 3}).status_code == 200
