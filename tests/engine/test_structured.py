"""Answers that a JSON schema or a regular expression describes: always valid, and the same with speculation on and off."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from engine_cases import PROMPTS, plan, tokens_of

import specmoe_jax as sm
from specmoe_jax.engine.requests.grammars import make_grammar, pass_masks
from specmoe_jax.models.model import random_model
from specmoe_jax.speculate.trees import make_tree
from specmoe_jax.testing import EOS_ID, TINY, byte_tokenizer, eagle_head
from specmoe_jax.testing.schemas import random_schema
from specmoe_jax.types import Proposal

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

SCHEMAS = [random_schema(seed) for seed in range(16)]
REGEX = r"(ja|nein|vielleicht( nicht)?), ([0-9]{1,3}|[äöü]+) (km|Äpfel)"
LONG = {"type": "string", "minLength": 500}
ROWS = 7
TREE = {"draft_tree_tokens": 8, "draft_tree_top_k": 3}
CASES = {
    "self draft": ("specmoe", {"draft_length": 3, "batch_size": ROWS}, False),
    "eagle tree": ("specmoeoff", {"draft_length": 3, "batch_size": ROWS} | TREE, True),
    "eagle": ("specmoeoff", {"draft_length": 3, "batch_size": ROWS}, True),
    "ngram": ("on_demand", {"draft": "ngram", "draft_length": 3, "kv_tier": "host", "batch_size": ROWS}, False),
    "streaming": ("streaming", {"batch_size": 4}, False),
}


@pytest.fixture(scope="module")
def long_model():
    """With a window for whole answers."""
    return random_model(dataclasses.replace(TINY, max_positions=400), seed=0, dtype="float32", tokenizer=byte_tokenizer())


def params(**given):
    drawn = {"temperature": 1.0, "max_new_tokens": 110} | given
    own = [sm.SamplingParams(json_schema=schema, seed=seed, **drawn) for seed, schema in enumerate(SCHEMAS)]
    return [*own, *[sm.SamplingParams(regex=REGEX, seed=seed, **drawn) for seed in range(2)], sm.SamplingParams(**drawn),
            sm.SamplingParams(json_schema=LONG, **drawn)]  # fmt: skip


ASKED = params()
TEXTS = [PROMPTS[number % 4] for number in range(len(ASKED))]


@pytest.fixture(scope="module")
def plain(long_model):
    return sm.Engine(long_model, plan("resident", batch_size=ROWS, deterministic_sampling=True)).generate(TEXTS, ASKED)


def check(params, completion):
    """A finished answer is valid; one that was cut says so."""
    if completion.finish_reason != "stop":
        assert completion.finish_reason == "length" and len(completion.token_ids) == params.max_new_tokens
        return False
    assert completion.token_ids[-1] == EOS_ID
    if params.regex is not None:
        assert re.fullmatch(params.regex, completion.text)
    elif params.json_schema is not None:
        jsonschema.Draft202012Validator(json.loads(params.json_schema)).validate(json.loads(completion.text))
    return True


def test_every_answer_that_ends_is_valid(plain):
    ended = [check(own, completion) for own, completion in zip(ASKED, plain, strict=True)]
    assert sum(ended[: len(SCHEMAS)]) > len(SCHEMAS) * 0.6 and all(ended[len(SCHEMAS) : len(SCHEMAS) + 2])
    assert plain[-1].finish_reason == "length" and plain[-1].text.startswith('"')


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_speculation_and_flows_change_nothing(long_model, plain, case):
    preset, changes, head = case
    a_plan = plan(preset, **changes, deterministic_sampling=True)
    engine = sm.Engine(long_model, a_plan, **({"draft_head": eagle_head(long_model)} if head else {}))
    assert tokens_of(engine.generate(TEXTS, ASKED)) == tokens_of(plain)
    assert engine.stats()["compilations_after_warmup"] == 0


def test_greedy_and_drawn_without_coupling(long_model):
    """Greedy tokens are equal; drawn ones are others, and as valid. A draft of valid tokens is accepted."""
    for given in ({"temperature": 0.0}, {"temperature": 1.0}):
        asked, draws = params(max_new_tokens=60, **given)[:ROWS], {}
        for preset, changes in (("resident", {}), ("specmoe", {"draft_length": 3})):
            done = sm.Engine(long_model, plan(preset, batch_size=ROWS, **changes)).generate(TEXTS[:ROWS], asked)
            [check(own, completion) for own, completion in zip(asked, done, strict=True)]
            draws[preset] = tokens_of(done)
        assert (draws["resident"] == draws["specmoe"]) == (given["temperature"] == 0.0)


def grammar(**given):
    return make_grammar(0, byte_tokenizer(), TINY.vocab_size, (EOS_ID,), sm.SamplingParams(**given))


def allowed(mask):
    """The bytes of a mask as text, the end as $."""
    tokens = np.flatnonzero((mask[:, None] >> np.arange(32)) & 1)
    return byte_tokenizer().decode([token for token in tokens if token != EOS_ID]) + "$" * (EOS_ID in tokens)


def test_masks_follow_every_branch():
    own, encode = grammar(regex="ab*c|b(d|ee)"), byte_tokenizer().encode
    assert [allowed(own.allowed(tuple(encode(text)))) for text in ("", "a", "abb", "b", "be", "a", "ac")] == [
        "ab", "bc", "bc", "de", "e", "bc", "$"]  # fmt: skip
    assert own.allowed(tuple(encode("ax"))) is None and own.allowed((*encode("ac"), EOS_ID)) is None
    tokens = np.array([encode("abxbde")[:6]], np.int32)  # a -> (b, x), b -> (d, e); after x one that stays unmasked
    tree = make_tree(np.array([[0, 1, 1, 0, 4, 4]]), 3)
    masks = pass_masks([(own, ()), None], Proposal(np.concatenate([tokens, tokens]), None, tree=tree._replace(
        parents=np.concatenate([tree.parents, tree.parents]))), TINY.vocab_size)  # fmt: skip
    assert [allowed(masks[0, node]) for node in (0, 1, 2, 4, 5, 6)] == ["ab", "bc", "bc", "de", "$", "e"]
    assert (masks[0, 3] == -1).all() and (masks[1] == -1).all()


def test_an_answer_that_bans_make_impossible_ends_with_an_error(long_model):
    asked = sm.SamplingParams(regex="a+b", banned_tokens=tuple(byte_tokenizer().encode("ab")))
    (done,) = sm.Engine(long_model, plan("resident")).generate(TEXTS[:1], asked)
    assert done.finish_reason == "error" and "within its regex" in done.error


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "a("}, "regex cannot be used .*unclosed group"),
        ({"json_schema": {"type": "strange"}}, "json_schema cannot be used .*Invalid type: strange"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "Unimplemented keys"),
        ({"json_schema": "{"}, "json_schema is '{'"),
        ({"json_schema": 3}, "json_schema is '3'"),
        ({"regex": 3}, "regex is 3"),
        ({"regex": "a", "json_schema": {}}, "both json_schema and regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos and regex exclude each other"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, fields, message):
    with pytest.raises(sm.RequestError, match=message):
        sm.Engine(model, plan("resident")).generate(PROMPTS[:1], sm.SamplingParams(**fields))


def test_models_without_a_tokenizer_or_an_end_and_machines_without_the_library(model, monkeypatch):
    asked = sm.SamplingParams(regex="a")
    with pytest.raises(sm.RequestError, match="regex needs a tokenizer"):
        sm.Engine(random_model(TINY, seed=0, dtype="float32"), plan("resident")).generate(PROMPTS[:1], asked)
    endless = dataclasses.replace(TINY, eos_token_ids=())
    with pytest.raises(sm.RequestError, match="needs an end-of-sequence token"):
        make_grammar(0, byte_tokenizer(), TINY.vocab_size, endless.eos_token_ids, asked)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(sm.RequestError, match=r'pip install "specmoe_jax\[structured\]"'):
        sm.Engine(model, plan("resident")).generate(PROMPTS[:1], sm.SamplingParams(regex="not asked before"))
