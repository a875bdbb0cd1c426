"""Lines of a prompts file that hold conversations, in the project's own form and in that of OpenAI's batches."""

import json

import pytest
from small_checkpoint_files import train_tokenizer

from specmoe_jax.checkpoints.channels import split_channels
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.jobs.job import _identity, error_record, record
from specmoe_jax.jobs.prompts import as_chat, read_prompts
from specmoe_jax.support.errors import RequestError
from specmoe_jax.types import TokenLogprob

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools is not none %}[{{ tools|tojson }}]{% endif %}"
    "{% if enable_thinking is defined %}({{ enable_thinking }}){% endif %}{{ effort }}"
)
TOKENIZER = Tokenizer(backend=train_tokenizer(), eos_token_ids=(2,))
TOOL = {"type": "function", "function": {"name": "f"}}
HI = {"role": "user", "content": "hi"}


def read(tmp_path, *lines, **options):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(str(tmp_path / "p.jsonl"), SamplingParams(), **options)


def rendered(tmp_path, *lines, every=False):
    pytest.importorskip("jinja2")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    prompts = as_chat(read(tmp_path, *lines), tmp_path, TOKENIZER, keep_bad=False, must_work=0, every=every)
    return [prompt.text if prompt.token_ids is None else TOKENIZER.decode(prompt.token_ids) for prompt in prompts]


def test_what_a_line_says_reaches_the_template(tmp_path):
    lines = [
        {"messages": [HI, {"role": "assistant", "content": "yes"}, HI]},
        {"prompt": "hi", "system": "be brief"},
        {"messages": [HI], "system": "be brief", "tools": [TOOL]},
        {"messages": [HI], "enable_thinking": False},
        {"messages": [HI], "chat_template_kwargs": {"effort": "much"}},
        {"prompt": "plain"},
    ]
    assert rendered(tmp_path, *lines) == [
        "<user>hi<assistant>yes<user>hi",
        "<system>be brief<user>hi",
        f"<system>be brief<user>hi[[{json.dumps(TOOL)}]]",
        "<user>hi(False)",
        "<user>himuch",
        "plain",
    ]
    assert rendered(tmp_path, *lines[-1:], every=True) == ["<user>plain"]


def test_a_line_says_how_it_is_sampled(tmp_path):
    asked = {"min_p": 0.1, "temperature": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": -0.5}
    ids = {"banned_tokens": [3, 4], "stop_token_ids": [5], "logprobs": 2, "prompt_logprobs": 0}
    (prompt,) = read(tmp_path, {"prompt": "hi", "logit_bias": {"7": 1.5, "2": -1}} | asked | ids)
    expected = asked | {"banned_tokens": (3, 4), "stop_token_ids": (5,), "logprobs": 2, "prompt_logprobs": 0}
    assert prompt.params == SamplingParams(logit_bias={2: -1, 7: 1.5}, **expected)
    (tmp_path / "g.jsonl").write_text('{"prompt": "a", "temperature": 0}')
    (greedy,) = read_prompts(str(tmp_path / "g.jsonl"), prompt.params)
    assert greedy.params.min_p == 0 and greedy.params.repetition_penalty == 1.2
    for line, words in (
        ({"logit_bias": {"x": 1}}, "a key is no id"),
        ({"logits_processor": 1}, "unknown field 'logits_processor'"),
    ):
        with pytest.raises(RequestError, match=words):
            read(tmp_path, {"prompt": "hi"} | line)


def test_an_older_jobs_identity_stays():
    """Fields that came later count only where they are used."""
    assert set(_identity(SamplingParams(temperature=0.5, top_k=3))) == {
        "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos",
    }  # fmt: skip
    assert _identity(SamplingParams(logit_bias={3: 1.0}, logprobs=0)).keys() >= {"logit_bias", "logprobs"}


def test_a_record_holds_the_logprobs_that_were_asked_for(tmp_path):
    (prompt,) = read(tmp_path, {"prompt": "hi", "logprobs": 1})
    told = (TokenLogprob(5, -0.5, ((7, -0.25),)),)
    line = record(0, prompt, Completion(0, "hi", "x", (5,), "length", 1, logprobs=told))
    assert json.loads(json.dumps(line["logprobs"])) == [{"token_id": 5, "logprob": -0.5, "top": [[7, -0.25]]}]
    assert "prompt_logprobs" not in line and "error" not in line


def test_the_text_of_a_conversation_is_its_last_message(tmp_path):
    first, second = read(tmp_path, {"messages": [HI]}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}]})
    assert first.text == "hi" and second.text == '[{"type": "text", "text": "é"}]'


BAD = [
    ({"messages": []}, "messages is empty"),
    ({"messages": "hi"}, "messages is 'hi'; it must be a list of objects"),
    ({"messages": ["hi"]}, "it must be a list of objects"),
    ({"messages": [HI], "prompt": "x"}, "both prompt and messages"),
    ({"messages": [HI], "tools": TOOL}, "tools is"),
    ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "system must be a text, and the only message"),
    ({"messages": [HI], "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
    ({"messages": [HI], "chat_template_kwargs": {"tools": []}}, "without tools, which is a field of its own"),
    ({"messages": [HI], "temprature": 1}, "unknown field 'temprature'; known are prompt, id, "),
    ({"system": "x"}, 'no text "prompt"'),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_lines_are_named(line, words, tmp_path):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, line)
    assert words in str(caught.value) and "line 1" in str(caught.value)


def batch(body: dict, **others) -> dict:
    return {"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": body} | others


def test_a_batch_line_is_read(tmp_path):
    body = {
        "model": "m", "messages": [HI], "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "n": 1,
        "stream": False, "presence_penalty": 0.0, "tools": [TOOL], "user": "me", "reasoning_effort": "low",
    }  # fmt: skip
    chat, text = read(tmp_path, batch(body), batch({"prompt": "once", "stop": ["a", "b"]}, custom_id="b", url="/v1/completions"))
    assert chat.id == "a-1" and chat.params == SamplingParams(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("x",))
    assert chat.conversation.tools == (TOOL,) and chat.conversation.options == {"reasoning_effort": "low"}
    assert (text.id, text.text, text.conversation, text.params.stop) == ("b", "once", None, ("a", "b"))


def test_forms_of_answers(tmp_path):
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    forms = [
        {"type": "text"},
        None,
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    ]
    own = read(tmp_path, *[batch({"messages": [HI], "response_format": form}, custom_id=str(n)) for n, form in enumerate(forms)],
               {"prompt": "x", "json_schema": schema}, {"prompt": "x", "regex": "a+"})  # fmt: skip
    assert [p.params.json_schema for p in own] == [
        None,
        None,
        '{"type": "object"}',
        *[json.dumps(schema, ensure_ascii=False)] * 2,
        None,
    ]
    assert own[-1].params.regex == "a+"


BAD_BATCH = [
    (batch({"messages": [HI], "n": 2}), "n is 2; built is 1 alone"),
    (batch({"messages": [HI], "stream": True}), "stream is True"),
    (batch({"messages": [HI], "frequency_penalty": 200}), "frequency_penalty is 200; it must be a number from -100"),
    (batch({"messages": [HI], "response_format": {"type": "json_schema"}}), "response_format is"),
    (batch({"messages": [HI], "response_format": "json"}), "response_format is json; give"),
    (batch({"messages": [HI], "top_kk": 1}), "unknown field 'top_kk'"),
    (batch({"prompt": "x"}), "body has no messages, which /v1/chat/completions needs"),
    (batch({"messages": [HI]}, url="/v1/embeddings"), "asks for POST '/v1/embeddings'"),
    (batch({"messages": [HI]}, custom_id=3), "custom_id must be a text"),
    (batch({"messages": [HI]}, extra=1), "unknown field 'extra'"),
]


@pytest.mark.parametrize(("line", "words"), BAD_BATCH, ids=[words for _, words in BAD_BATCH])
def test_bad_batch_lines_are_named(line, words, tmp_path):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, line)
    assert words in str(caught.value)


def test_answers_to_a_batch_have_its_form(tmp_path):
    chat, text = read(tmp_path, batch({"model": "m", "messages": [HI]}), batch({"prompt": "p"}, url="/v1/completions"))
    done = Completion(4, "hi", "hello", (1, 2, 3), "stop", 5)
    answer = record(4, chat, done)
    assert (answer["custom_id"], answer["error"], answer["index"]) == ("a-1", None, 4)
    assert answer["response"]["status_code"] == 200
    body = answer["response"]["body"]
    assert body["model"] == "m" and body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert record(0, text, done)["response"]["body"]["choices"][0]["text"] == "hello"
    refused = error_record(1, chat, "too long")
    assert refused["response"]["status_code"] == 400 and refused["response"]["body"]["error"]["message"] == "too long"


@pytest.mark.parametrize("line", [line for line, _ in BAD_BATCH])
def test_a_bad_line_is_answered_in_the_form_of_the_batch(line, tmp_path):
    (prompt,) = read(tmp_path, line, keep_bad=True)
    answer = error_record(0, prompt, prompt.error)
    assert answer["custom_id"] == str(line["custom_id"]) and answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["message"] == prompt.error


HARMONY = "<|channel|>analysis<|message|>Hm.\nWell.<|end|><|start|>assistant<|channel|>final<|message|>Yes."


def test_channels_are_kept_apart(tmp_path):
    assert split_channels(HARMONY) == {"analysis": "Hm.\nWell.", "final": "Yes."}
    assert split_channels("plain") == {} and split_channels("<|channel|>analysis<|message|>unfini") == {"analysis": "unfini"}
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert split_channels(call) == {"commentary": "{}"}
    plain, chat = read(tmp_path, {"prompt": "p"}, batch({"messages": [HI]}))
    done = Completion(0, "p", HARMONY, (1,), "stop", 1)
    assert record(0, plain, done)["channels"] == {"analysis": "Hm.\nWell.", "final": "Yes."}
    message = record(0, chat, done)["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.\nWell."}
