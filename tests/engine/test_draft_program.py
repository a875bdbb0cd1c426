"""A draft of several tokens is one program, and proposes what a call of `forward` for each token would."""

import inspect

import jax
import pytest
from engine_cases import GREEDY, SAMPLED, plan, run

import specmoe_jax as sm
from specmoe_jax.engine.flows import resident_programs
from specmoe_jax.engine.flows.layer_passes import DraftForward
from specmoe_jax.testing import tiny
from specmoe_jax.testing.families import tiny_family

CASES = {
    "greedy": ({}, GREEDY),
    "sampled": ({}, SAMPLED),
    "coupled": ({"deterministic_sampling": True}, SAMPLED),
    "mask": ({"substitution": "mask"}, GREEDY),
    "distinct": ({"substitution": "distinct"}, GREEDY),
    "per layer": ({"draft_experts": (1, 2, 3)}, GREEDY),
    "merged": ({"draft": "merged"}, GREEDY),
}


@pytest.fixture
def calls(monkeypatch):
    """The programs of drafts that run, by name."""
    made = []
    for name in ("draft_chain", "draft_forward"):
        program = getattr(resident_programs, name)

        def spy(*args, name=name, program=program, **kwargs):
            made.append(name)
            return program(*args, **kwargs)

        monkeypatch.setattr(resident_programs, name, spy)
    return made


@pytest.mark.parametrize("name", CASES)
def test_one_program_proposes_what_single_tokens_do(model, calls, monkeypatch, name):
    fields, params = CASES[name]
    a_plan = plan(**{"draft_length": 3, "draft_experts": 2} | fields)
    chained, stats = run(model, a_plan, params=params)
    assert set(calls) == {"draft_chain"}
    monkeypatch.setattr(DraftForward, "chain", None)
    single, others = run(model, a_plan, params=params)
    assert set(calls) == {"draft_chain", "draft_forward"}
    assert chained == single
    assert stats["acceptance_by_position"] == others["acceptance_by_position"]
    assert 0 < stats["acceptance_by_position"][0] < 1


def test_what_a_prefetch_waits_for_is_a_program_a_token(model, calls):
    run(model, plan(draft_length=3, draft_experts=2, prefetch="draft"))
    assert set(calls) == {"draft_forward"}


def test_one_program_serves_all_lengths(model, monkeypatch):
    """A guard drafts 1, 2 or 4 tokens."""
    before = resident_programs.draft_chain._cache_size()
    a_plan = plan(draft_length=4, draft_experts=4, guard=True, batch_size=3)
    _, stats = run(model, a_plan, [(1, 2, 3), (4, 5), (6,)])
    assert stats["compilations_after_warmup"] == 0
    assert resident_programs.draft_chain._cache_size() == before + 1


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_other_layers(family):
    """Dense layers among those with experts, latent attention, sinks, two kinds of layers."""
    model = tiny_family(family)
    expected, _ = run(model, plan("resident"), [(1, 2, 3), (4, 5)])
    fields = {"draft_length": 3, "draft_experts": 2}
    assert run(model, plan(**fields), [(1, 2, 3), (4, 5)])[0] == expected


def test_half_precision_weights_are_not_kept_in_float32(monkeypatch):
    """XLA would hoist the conversion of all of them out of the loop over tokens (on a CPU), and keep what it gives."""
    program, temporary = resident_programs.draft_chain, []
    hoisting = jax.jit(inspect.unwrap(program), static_argnums=(0, 1, 2), donate_argnums=(4, 5), static_argnames="split")

    def spy(*args, **kwargs):
        programs = [one.lower(*args, **kwargs).compile() for one in (program, hoisting)]
        temporary.append([one.memory_analysis().temp_size_in_bytes for one in programs])
        return program(*args, **kwargs)

    monkeypatch.setattr(resident_programs, "draft_chain", spy)
    model = tiny("bfloat16")
    run(model, plan(draft_length=2, draft_experts=2, dtype="bfloat16"), [(1, 2, 3)], sm.SamplingParams(max_new_tokens=2))
    ours, theirs = temporary[0]
    assert ours < theirs - sum(array.nbytes for array in jax.tree.leaves(model.weights.layers))
