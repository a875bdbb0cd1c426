"""Where a request ends: end-of-sequence tokens, stop strings and limits, inside accepted runs too."""

import dataclasses

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.engine.requests.finish import commit_tokens, ends_in_stop, final_text
from specmoe_jax.engine.state import Request
from specmoe_jax.testing import EOS_ID, TINY, byte_tokenizer

ALL_ACCEPTED = plan(draft_length=8, draft_experts=TINY.num_experts)  # every run has 9 tokens
SOME_ACCEPTED = plan(draft_length=3, draft_experts=3)


class Letters:
    """A tokenizer whose token i is one letter, and token 32 two: what comes out is easy to cut."""

    eos_token_ids = (EOS_ID,)

    def decode(self, ids):
        return "".join("" if i == EOS_ID else chr(0x4E00 + i) * (1 + (i == 32)) for i in ids)


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.fixture(scope="module")
def with_eos(model, resident):
    """The same model, whose end-of-sequence token is one that row 2 first writes in the middle of a run."""
    end = next(t for i, t in enumerate(resident[2]) if 3 <= i <= 6 and t not in resident[2][:i])
    return dataclasses.replace(model, config=dataclasses.replace(TINY, eos_token_ids=(end,)))


def cut_after(tokens, end):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("a_plan", [plan("resident"), plan("on_demand"), ALL_ACCEPTED, SOME_ACCEPTED], ids=lambda p: p.preset)
def test_eos_ends_a_row_inside_a_run(with_eos, resident, a_plan):
    params = sm.SamplingParams(max_new_tokens=16)
    (end,) = with_eos.config.eos_token_ids
    completions = sm.Engine(with_eos, a_plan).generate(PROMPTS, params)
    assert [c.token_ids for c in completions] == [cut_after(tokens, end) for tokens in resident]
    assert [c.finish_reason for c in completions] == ["stop" if end in tokens else "length" for tokens in resident]
    assert completions[2].finish_reason == "stop" and 4 <= len(completions[2].token_ids) <= 7


def test_ignore_eos(with_eos, resident):
    completions = sm.Engine(with_eos, ALL_ACCEPTED).generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in completions] == resident
    assert {c.finish_reason for c in completions} == {"length"}


@pytest.mark.parametrize("limit", [1, 2, 8, 9, 10, 15])
def test_max_new_tokens_inside_a_run(model, resident, limit):
    params = sm.SamplingParams(max_new_tokens=limit, ignore_eos=True)
    for a_plan in (ALL_ACCEPTED, SOME_ACCEPTED):
        tokens, stats = run(model, a_plan, params=params)
        assert tokens == [row[:limit] for row in resident]
        assert stats["new_tokens"] == limit * len(PROMPTS)


def test_limits_of_each_row(model, resident):
    params = [sm.SamplingParams(max_new_tokens=limit, ignore_eos=True) for limit in (3, 16, 1, 9, 2, 11, 5, 16)]
    tokens, _ = run(model, SOME_ACCEPTED, params=params)
    assert tokens == [row[: p.max_new_tokens] for row, p in zip(resident, params, strict=True)]


@pytest.mark.slow
def test_stop_string_across_tokens(model, resident):
    """The stop string begins in one token and ends in the next; the text is cut before it."""
    lettered = dataclasses.replace(model, tokenizer=Letters())
    for row, tokens in enumerate(resident):
        text = Letters().decode(tokens)
        stop = text[3:5]
        params = sm.SamplingParams(max_new_tokens=16, ignore_eos=True, stop=("never", stop))
        for a_plan in (ALL_ACCEPTED, SOME_ACCEPTED):
            (done,) = sm.Engine(lettered, a_plan).generate([PROMPTS[row]], params)
            assert done.finish_reason == "stop"
            assert done.text == text[: text.index(stop)]
            assert done.token_ids == tokens[: len(done.token_ids)]
            assert stop in Letters().decode(done.token_ids) and stop not in Letters().decode(done.token_ids[:-1])


@pytest.mark.slow
def test_prompt_of_one_token_and_of_the_whole_window(model):
    """Window - 1 prompt tokens leave room for one; a window of them for none."""
    window = TINY.max_positions
    long = tuple(int(t) for t in np.random.default_rng(0).integers(0, 256, window - 1))
    params = sm.SamplingParams(max_new_tokens=50, ignore_eos=True)
    prompts = [long[:1], long, long[:-1], long[: window - 10], *PROMPTS[4:]]
    expected = [50, 1, 2, 10, 50, 50, 50, 50]
    tokens, _ = run(model, plan("resident"), prompts, params)
    assert [len(row) for row in tokens] == expected
    assert run(model, SOME_ACCEPTED, prompts, params)[0] == tokens
    assert run(model, ALL_ACCEPTED.replace(kv_tier="host"), prompts, params)[0] == tokens
    for row in (1, 2):
        choices = np.asarray(model.logits([prompts[row]]))[0].argmax(-1)
        assert tokens[row][0] == choices[-1]
    with pytest.raises(sm.RequestError, match=f"has {window} tokens and the model's window is {window}"):
        run(model, SOME_ACCEPTED, [(*long, 1)], params)


@pytest.mark.parametrize("preset", ["on_demand", "specmoe"])
def test_longest_generation_stays_in_the_cache(model, preset):
    """To the last position of the window, where drafted rows overshoot it."""
    params = sm.SamplingParams(max_new_tokens=1000, ignore_eos=True)
    tokens, _ = run(model, SOME_ACCEPTED if preset == "specmoe" else plan(preset), params=params)
    rows = np.zeros((len(PROMPTS), TINY.max_positions), np.int32)
    for row in range(len(PROMPTS)):
        assert len(tokens[row]) == TINY.max_positions - len(PROMPTS[row])
        rows[row] = PROMPTS[row] + tokens[row]
    choices = np.asarray(model.logits(rows)).argmax(-1)
    for row in range(len(PROMPTS)):
        assert choices[row, len(PROMPTS[row]) - 1 : -1].tolist() == list(tokens[row])


# The rules themselves, as the pure functions that they are.


def request(limit=100, **params):
    return Request(id=0, prompt=None, token_ids=(1,), params=sm.SamplingParams(**params), limit=limit)


@pytest.mark.parametrize(
    ("run", "limit", "params", "kept", "reason"),
    [
        ((5, 6), 100, {}, (9, 5, 6), None),
        ((5, 6), 3, {}, (9, 5, 6), "length"),
        ((5, 6, 7), 2, {}, (9, 5), "length"),
        ((5, EOS_ID, 7), 100, {}, (9, 5, EOS_ID), "stop"),
        ((5, EOS_ID, 7), 100, {"ignore_eos": True}, (9, 5, EOS_ID, 7), None),
        ((5, EOS_ID), 3, {}, (9, 5, EOS_ID), "stop"),
        ((5, 6, 7), 100, {"stop": ("丅丆",)}, (9, 5, 6), "stop"),
        ((5, 6, 7), 100, {"stop": ("丆", "丅")}, (9, 5), "stop"),
        ((5, 32, 7), 100, {"stop": (chr(0x4E00 + 32),)}, (9, 5, 32), "stop"),
        ((6, 5), 100, {"stop": ("丅丆",)}, (9, 6, 5), None),
        ((5,), 100, {"stop": ("上丅",)}, (9, 5), None),
        ((5,), 100, {"stop": (chr(0x4E09) + chr(0x4E05),)}, (9, 5), "stop"),
    ],
)
def test_commit_tokens(run, limit, params, kept, reason):
    assert commit_tokens(request(limit, **params), (9,), run, (EOS_ID,), Letters()) == (kept, reason)


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        ((5, 6), (), "丅丆"),
        ((5, 6, EOS_ID), (), "丅丆"),
        ((), (), ""),
        ((EOS_ID,), (), ""),
        ((5, 6, 7), ("丆",), "丅"),
        ((5, 6, 7), ("万", "丆"), "丅"),
        ((32,), (chr(0x4E20),), ""),
    ],
)
def test_final_text(tokens, stop, text):
    assert final_text(tokens, stop, (EOS_ID,), Letters()) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_are_found_in_the_end_of_the_text(data):
    """As in the whole text decoded anew for each token, whatever the characters, special tokens and ids without text."""
    tokenizer = byte_tokenizer()
    text = data.draw(st.text(st.sampled_from("ab \u00e9\u4e05\U0001f600"), min_size=1, max_size=150)).encode()
    silent = st.lists(st.sampled_from([EOS_ID, 260]), max_size=30)
    tokens = [t for b in text for t in (*(data.draw(silent) if data.draw(st.integers(0, 9)) == 0 else ()), *tokenizer.encode("a"))]
    ids = iter(tokenizer.backend.encode(text.decode()).ids)
    tokens = tuple(next(ids) if t == tokenizer.encode("a")[0] else t for t in tokens)
    stop = tuple(data.draw(st.lists(st.text(st.sampled_from("ab \u00e9\u4e05\U0001f600"), min_size=1, max_size=6), min_size=1)))
    for length in range(1, len(tokens) + 1):
        whole = any(string in tokenizer.decode(tokens[:length]) for string in stop)
        assert ends_in_stop(tokenizer, tokens[:length], stop) == whole
        if whole:
            break


def test_stop_strings_cost_the_same_at_any_length():
    """Tokens decoded for one more token, after 100 and after 10,000 of them."""

    class Counting(Letters):
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return super().decode(ids)

    counts = []
    for length in (100, 10_000):
        tokenizer = Counting()
        assert not ends_in_stop(tokenizer, (7,) * length, ("never",))
        counts.append(tokenizer.decoded)
    assert counts[0] == counts[1] < 300
