"""Perplexity, kept answers and the adapter's own rules; tests/evaluation/test_harness.py has the harness itself."""

import json
import math
import pathlib
import subprocess
import sys
import types

import pytest
from engine_cases import plan

import specmoe_jax as sm
from specmoe_jax.evaluation import perplexity
from specmoe_jax.evaluation.answers import Answers
from specmoe_jax.evaluation.harness import _EngineAdapter, sampling_of
from specmoe_jax.testing import EOS_ID

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(model):
    return sm.Engine(model, plan("streaming", batch_size=4))


def asked(*args):
    return types.SimpleNamespace(args=args)


def adapter(engine, **changes):
    given = {"answers": Answers(engine, None), "max_length": None, "at_once": 2, "progress": "none", "chat_options": {}} | changes
    return _EngineAdapter(engine, *given.values())


def test_perplexity_is_of_the_whole_text(engine):
    text = "a few words, and a few more of them"
    found = perplexity(engine, text, window=16, overlap=4)
    (score,) = engine.score_rolling([text], window=16, overlap=4)
    assert (found.tokens, found.words, found.utf8_bytes) == (len(text), 9, len(text))
    assert found.per_token == pytest.approx(math.exp(-score.sum / len(text)))
    assert found.bits_per_byte == pytest.approx(math.log2(found.per_token))
    assert found.to_dict()["perplexity_per_word"] == pytest.approx(math.exp(-score.sum / 9))


def test_answers_are_kept_and_a_broken_run_goes_on(engine, tmp_path):
    path, questions, calls = str(tmp_path / "answers.jsonl"), [["a", 1], ["b", 2], ["c", 3], ["a", 1]], []
    told = types.SimpleNamespace(update=lambda count: None)

    def ask(some):
        calls.append(some)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [number * 10 for number in some]

    first = Answers(engine, path)
    with pytest.raises(KeyboardInterrupt):
        first.of("kind", questions, ask, 2, told)
    first.close()
    second = Answers(engine, path)
    assert second.of("kind", questions, ask, 2, told) == [0, 10, 20, 0]
    assert calls == [[0, 1], [2], [2]]  # the fourth question is the first one
    assert second.of("other", questions[:1], ask, 2, told) == [0]
    second.close()


def test_a_question_is_asked_and_kept_once(engine, tmp_path):
    """Wherever it recurs: in another lot, or in another call."""
    asked, path, told = [], str(tmp_path / "answers.jsonl"), types.SimpleNamespace(update=lambda count: None)
    questions = [["a", 1], ["b", 2], ["a", 1], ["c", 3]]

    def ask(numbers):
        asked.extend(numbers)
        return [questions[number][0] for number in numbers]

    first = Answers(engine, path)
    for _ in range(2):
        assert first.of("kind", questions, ask, 2, told) == ["a", "b", "a", "c"]
    first.close()
    second = Answers(engine, path)
    assert second.of("kind", questions, ask, 2, told) == ["a", "b", "a", "c"]
    second.close()
    assert asked == [0, 1, 3]


def test_answers_of_another_model_are_refused(engine, model, tmp_path):
    path = str(tmp_path / "answers.jsonl")
    Answers(engine, path).close()
    other = sm.Engine(model, plan("resident"))
    object.__setattr__(other.plan, "dtype", "bfloat16")
    with pytest.raises(sm.RequestError, match="begun with other dtype"):
        Answers(other, path)


def test_an_empty_context_is_the_prefix(engine):
    own = adapter(engine)
    (total, greedy), (spaced, _), (marked, _) = own.loglikelihood([asked("", "sea"), asked("the ", "sea"), asked("", "</s>sea")])
    byte = engine.model.tokenizer.encode
    scores = engine.score([((EOS_ID,), byte("sea")), (byte("the"), byte(" sea")), ((EOS_ID,), byte("sea"))])
    assert greedy == scores[0].is_greedy
    assert [total, spaced, marked] == pytest.approx([score.sum for score in scores], abs=1e-4)


def test_a_long_context_is_cut_from_the_left(engine):
    own = adapter(engine, max_length=8)
    with pytest.warns(RuntimeWarning, match="a context of 12 tokens is cut to its last 6"):
        ((total, _),) = own.loglikelihood([asked("0123456789ab", "xyz")])
    (score,) = engine.score([("6789ab", "xyz")])
    assert total == pytest.approx(score.sum, abs=1e-5)
    with pytest.raises(sm.RequestError, match="does not fit into max_length=8"):
        own.loglikelihood([asked("a", "123456789")])


def test_texts_are_rolled_over_and_generated(engine):
    own = adapter(engine, max_length=20)
    text = "a text of more than one window, as it should be"
    (total,) = own.loglikelihood_rolling([asked(text)])
    (score,) = engine.score_rolling([text], window=20)
    assert total == pytest.approx(score.sum, abs=1e-4)
    texts = own.generate_until([asked("one", {"until": "x", "max_gen_toks": 4}), asked("two", {"max_gen_toks": 6})])
    params = [sm.SamplingParams(max_new_tokens=4, stop=("x",)), sm.SamplingParams(max_new_tokens=6)]
    assert texts == [done.text for done in engine.generate(["one", "two"], params)]


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_new_tokens": 256}),
        ({"until": ["\n", ""], "max_gen_toks": "7"}, {"max_new_tokens": 7, "stop": ("\n",)}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "num_beams": 1}, {"max_new_tokens": 256}),
        ({"do_sample": True, "min_p": 0.1}, {"max_new_tokens": 256, "temperature": 1.0, "min_p": 0.1}),
        ({"temperature": 0.5, "repetition_penalty": 1.1}, {"max_new_tokens": 256, "temperature": 0.5, "repetition_penalty": 1.1}),
    ],
)
def test_generation_arguments(options, expected):
    assert sampling_of(options) == sm.SamplingParams(**expected)


def test_arguments_that_are_not_built_are_refused():
    with pytest.raises(sm.RequestError, match="num_beams=4 in generation, which is not built"):
        sampling_of({"num_beams": 4})


def test_the_harness_is_named_where_it_is_missing(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(sm.UserError, match=r"pip install specmoe_jax\[eval\]"):
        sm.evaluation.harness_model(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--text=text.txt", "--window=64"], 0, '"perplexity_per_token"'),
        (["--text=missing.txt"], 1, "cannot read the text"),
        (["--text=text.txt", "--limit=3"], 2, "--limit has no effect with --text"),
        (["--text=text.txt", "--preset=specmoeoff"], 1, "evaluate takes no plan with a draft model"),
        ([], 2, "give --text=FILE or --tasks=NAMES"),
    ],
)
def test_the_command(flags, code, words, tmp_path):
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    command = [sys.executable, ROOT / "scripts/evaluate.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    if code == 0:
        assert json.loads(done.stdout.splitlines()[-1])["tokens"] > 10


@pytest.mark.slow
def test_the_example():
    """docs/examples/score_and_evaluate.py runs to its end, with or without the harness."""
    command = [sys.executable, ROOT / "docs/examples/score_and_evaluate.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for words in ("log-probability", "bits per byte", "has probability"):
        assert words in done.stdout
