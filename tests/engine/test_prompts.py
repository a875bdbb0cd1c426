"""Prompts, from files and in calls: what is read, and that whatever else comes is refused by a RequestError."""

import dataclasses
import json

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, plan
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.engine.requests.prepare import make_requests
from specmoe_jax.jobs.prompts import Prompt, read_prompts
from specmoe_jax.testing import EOS_ID, TINY

DEFAULTS = sm.SamplingParams(max_new_tokens=7)


@pytest.fixture
def write(tmp_path):
    def write(text, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(path):
    with pytest.raises(sm.RequestError) as e:
        read_prompts(path, DEFAULTS)
    return str(e.value)


def test_text_lines(write):
    prompts = read_prompts(write("first\n\n  second one\r\n \nlast\u2028still last", "p.txt"), DEFAULTS)
    assert [(p.id, p.text) for p in prompts] == [(0, "first"), (1, "  second one"), (2, "last\u2028still last")]
    assert all(p.params == DEFAULTS for p in prompts)


def test_json_lines(write):
    lines = [
        '{"prompt": "a"}',
        "",
        '{"prompt": "b", "id": "x", "max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "stop": ["\\n"], "seed": 9}',
        '\ufeff{"prompt": "c\u2028d", "ignore_eos": true}'[1:],
    ]
    first, second, third = read_prompts(write("\n".join(lines)), DEFAULTS)
    assert first == Prompt(0, "a", DEFAULTS)
    assert second.id == "x" and second.params == sm.SamplingParams(max_new_tokens=3, temperature=0.5, top_k=4, stop=("\n",), seed=9)
    assert third.text == "c\u2028d" and third.params.ignore_eos


def test_byte_order_mark(write):
    assert read_prompts(write("\ufeffhello", "p.txt"), DEFAULTS)[0].text == "hello"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2 has no text "prompt"'),
        ('{"prompt": 3}', 'line 2 has no text "prompt"'),
        ('{"prompt": "a", "temprature": 1}', "line 2 has the unknown field 'temprature'; known are prompt, id, "),
        ('{"prompt": "a", "max_new_tokens": "5"}', "line 2: max_new_tokens is '5'"),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "line 2: max_new_tokens is 1.5"),
        ('{"prompt": "a", "temperature": NaN}', "line 2: temperature is nan"),
        ('{"prompt": "a", "stop": "abc"}', "line 2: stop is 'abc'"),
        ('{"prompt": "a", "stop": [3]}', "line 2: stop is (3,)"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed is -1"),
        ('{"prompt": "a", "top_p": 0.5}', "line 2: top_k and top_p have no effect at temperature 0"),
        ('{"prompt": [1, "a"]}', 'line 2: "prompt" is a list; it must be of token ids'),
        ('{"prompt": [true]}', 'line 2: "prompt" is a list; it must be of token ids'),
        ('{"prompt": []}', 'line 2: "prompt" is a list; it must be of token ids'),
        ('{"prompt": "a", "id": [1]}', "line 2 has the id [1]"),
        ('{"prompt": "a", "id": null}', "line 2 has the id None"),
        ('{"prompt": "\\ud800"}', "line 2 holds half of a surrogate pair"),
        ('{"prompt": "a", "id": "\\udfff"}', "line 2 holds half of a surrogate pair"),
    ],
)
def test_bad_lines(write, line, said):
    message = refusal(write('{"prompt": "a"}\n' + line))
    assert said in message and "\n" not in message


def test_bad_files(write, tmp_path):
    assert "cannot read prompts" in refusal(str(tmp_path / "none.txt"))
    assert "has no state.json, as a saved dataset has, and no *.parquet" in refusal(str(tmp_path))
    assert "cannot read prompts" in refusal("a\0b.txt")
    assert "UTF-8" in refusal(write(b"\xff\xfe", "p.txt"))
    assert "it must be .txt (one a line), .jsonl, .parquet" in refusal(write("a", "p.csv"))
    assert "holds no prompt" in refusal(write("\n \n", "p.txt"))
    assert "holds no prompt" in refusal(write(""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=5,
)
FIELDS = ["id", *sm.SamplingParams.__dataclass_fields__]
LINE = st.fixed_dictionaries({"prompt": st.text() | JSON}, optional=dict.fromkeys(FIELDS, JSON)).map(json.dumps)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE | st.text(), max_size=3).map("\n".join).map(lambda s: s.encode("utf-8", "replace")) | st.binary())
@example(b"[" * 100_000)
@example(b"1" * 5000)
def test_only_request_errors_come_out_of_a_prompt_file(write, content):
    for name in ("p.jsonl", "p.txt"):
        try:
            prompts = read_prompts(write(content, name), DEFAULTS)
        except sm.RequestError as e:
            assert str(e)
            continue
        for prompt in prompts:
            json.dumps([prompt.id, prompt.text], ensure_ascii=False).encode()
            assert isinstance(prompt.params, sm.SamplingParams)


# Calls.


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ("text", None, "prompts is one text; give a list"),
        ([], None, "no prompts were given"),
        (["a", ""], None, "prompt 1 is empty; give at least one"),
        ([[]], None, "prompt 0 is empty; give at least one"),
        ([1, 2, 3], None, "prompt 0 is neither a text nor a list of token ids"),
        ([[1.5]], None, "prompt 0 is neither a text nor a list of token ids"),
        ([None], None, "prompt 0 is neither a text nor a list of token ids"),
        ([[1, 263]], None, "prompt 0 holds a token id outside 0..262"),
        ([[1, -1]], None, "prompt 0 holds a token id outside 0..262"),
        (["a", "b"], [DEFAULTS], "2 prompts and 1 sampling parameters"),
        (["a" * 90], None, "prompt 0 has 90 tokens and the model's window is 90, one of them for the answer; shorten it to 89"),
        (["\ud800"], None, "prompt 0 holds half of a surrogate pair, or bytes that are not UTF-8"),
        (["caf\udce9"], None, "prompt 0 holds half of a surrogate pair, or bytes that are not UTF-8"),  # as sys.argv has it
        ([b"ab"], None, "prompt 0 is neither a text nor a list of token ids (it is a bytes)"),
        ([bytearray(b"ab")], None, "prompt 0 is neither a text nor a list of token ids (it is a bytearray)"),
        ([[1, True]], None, "prompt 0 is neither a text nor a list of token ids (it holds a bool)"),
        ([np.array([True, False])], None, "prompt 0 is neither a text nor a list of token ids (it holds a bool)"),
        ([{1: 2}], None, "prompt 0 is neither a text nor a list of token ids (it is a dict)"),
        ([{1, 2}], None, "prompt 0 is neither a text nor a list of token ids (it is a set)"),
        (b"text", None, "prompts is a bytes; give a list"),
        ({"a": "b"}, None, "prompts is a dict; give a list"),
        (7, None, "prompts is 7; give a list"),
        (["a"], {"temperature": 1}, "params holds 'temperature'; give one SamplingParams for all"),
        (["a"], [{"temperature": 1}], "params holds {'temperature': 1}; give one SamplingParams for all"),
        (["a"], 3, "params is 3; give one SamplingParams for all"),
    ],
)
def test_bad_calls(model, prompts, params, said):
    with pytest.raises(sm.RequestError) as e:
        make_requests(model, prompts, params)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_prompts_of_all_kinds(model):
    for prompts in (np.array([[1, 2], [3, 4]]), [np.array([1, 2]), (3, 4)], ([1, 2], [np.int32(3), 4])):
        assert [request.token_ids for request in make_requests(model, prompts, None)] == [(1, 2), (3, 4)]
    (request,) = make_requests(model, ["a</s>"], DEFAULTS)
    assert request.token_ids == (64, EOS_ID) and request.prompt == "a</s>" and request.limit == 7


def test_generators_are_lists(model):
    prompts = (tuple(pair) for pair in ([1, 2], [3, 4]))
    params = (dataclasses.replace(DEFAULTS, seed=seed) for seed in (5, 6))
    made = make_requests(model, prompts, params, (number for number in (8, 9)))
    assert [(request.id, request.token_ids, request.params.seed) for request in made] == [(8, (1, 2), 5), (9, (3, 4), 6)]
    assert make_requests(model, [(token for token in (1, 2))], None)[0].token_ids == (1, 2)


def test_scalars_of_numpy_are_pythons():
    """They went into fingerprints and figures, which are JSON."""
    given = {"max_new_tokens": np.int64(5), "temperature": np.float32(0.5), "top_k": np.int8(3), "top_p": np.float64(0.5)}
    params = sm.SamplingParams(**given, seed=np.uint32(7), ignore_eos=np.bool_(True))
    assert params == sm.SamplingParams(5, 0.5, 3, 0.5, 7, (), True)
    json.dumps(dataclasses.asdict(params))
    plan = sm.Plan("mine", batch_size=np.int64(3), draft="self", draft_experts=(np.int32(2), 3), guard=np.bool_(False))
    assert json.loads(plan.to_json())["draft_experts"] == [2, 3] and type(plan.batch_size) is int and plan.guard is False


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "seed", "top_k"])
def test_numbers_without_end_are_refused_in_a_line(name):
    """A limit of 4,001 digits was an OverflowError after the answers were written."""
    with pytest.raises(sm.RequestError) as refused:
        sm.SamplingParams(**{"temperature": 1.0} | {name: 10**4000})
    assert len(str(refused.value)) < 200 and f"{name} is 1000" in str(refused.value)


def test_a_prompt_file_may_hold_token_ids(write):
    ids, text = read_prompts(write('{"prompt": [3, 1, 2], "id": "x"}\n{"prompt": "a"}'), DEFAULTS)
    assert (ids.model_input, ids.id, text.model_input) == ((3, 1, 2), "x", "a")


def test_defaults_of_sampled_lines_leave_greedy_ones_alone(write):
    path = write('{"prompt": "a", "temperature": 0.9}\n{"prompt": "b"}\n{"prompt": "c", "temperature": 1, "top_k": 4}')
    prompts = read_prompts(path, DEFAULTS, sampled={"top_k": 5, "top_p": 0.5})
    assert [(p.params.temperature, p.params.top_k, p.params.top_p) for p in prompts] == [(0.9, 5, 0.5), (0, 0, 1), (1, 4, 0.5)]


def test_a_stream_can_be_closed(model):
    """Of every flow; nothing runs afterwards."""
    for name in ("resident", "on_demand", "streaming"):
        engine = sm.Engine(model, plan(name).replace(batch_size=1))
        events = engine.stream(PROMPTS[:2], GREEDY)
        next(events)
        steps = engine.stats()["steps"]
        events.close()
        assert not list(events) and engine.stats()["steps"] == steps


def test_the_limit_is_what_the_window_leaves(model):
    window = TINY.max_positions
    limits = [make_requests(model, [[1] * n], DEFAULTS)[0].limit for n in (1, window - 8, window - 7, window - 6, window - 1)]
    assert limits == [7, 7, 7, 6, 1]


def test_nothing_runs_before_all_prompts_are_checked(model):
    engine = sm.Engine(model, sm.PRESETS["on_demand"](TINY).replace(batch_size=1))
    with pytest.raises(sm.RequestError, match="prompt 1 is empty"):
        engine.generate([[1], []])
    with pytest.raises(sm.RequestError, match="prompt 1 is empty"):
        engine.stream([[1], []])  # at the call, not when the first token is asked for
    assert engine.stats()["steps"] == 0


def test_no_tokenizer():
    model = sm.random_model(TINY)
    with pytest.raises(sm.RequestError, match="prompt 0 needs a tokenizer and the model has none; give token ids"):
        make_requests(model, ["a"], None)
    with pytest.raises(sm.RequestError, match="no stop strings"):
        make_requests(model, [[1]], sm.SamplingParams(stop=("a",)))
    assert make_requests(model, [[1]], None)[0].token_ids == (1,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "2 prompts and 1 different ids"),
        ([1, 1], "2 prompts and 1 different ids"),
        ([1, 2, 3], "2 prompts and 3 different ids"),
        ([0, -1], "within 0 to 4294967295"),
        ([0, 1 << 32], "within 0 to 4294967295"),
        ([0, 1.5], "whole numbers"),
    ],
    ids=str,
)
def test_ids_of_requests(model, ids, message):
    """They key the sampling as 32 bits, and tell events apart."""
    with pytest.raises(sm.RequestError, match=message):
        sm.Engine(model, plan("resident")).stream(PROMPTS[:2], GREEDY, ids=ids)
    most = [(1 << 32) - 1, 0]
    events = sm.Engine(model, plan("resident")).stream(PROMPTS[:2], GREEDY, ids=most)
    assert {event.id for event in events} == set(most)
