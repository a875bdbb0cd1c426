"""Shapes are fixed after warm-up: nothing compiles during 50 steps, nor for further batches of the same shapes."""

import numpy as np
import pytest
from engine_cases import PROMPTS, SAMPLED, plan

import specmoe_jax as sm
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY
from specmoe_jax.types import Proposal

LONG = sm.SamplingParams(max_new_tokens=60, ignore_eos=True)
# Rows of 80, 40, 20, ... tokens end one after the other while others go on.
RAGGED = [sm.SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (80, 40, 20, 80, 9, 1, 33, 60)]
RAGGED_SAMPLED = [
    sm.SamplingParams(max_new_tokens=p.max_new_tokens, ignore_eos=True, temperature=1.0, top_k=50, top_p=0.9) for p in RAGGED
]
SLOW = dict(draft_length=2, draft_experts=1)  # accepts little, so that 80 tokens take 50 steps
DISPATCH = TINY.num_layers + 2  # slots of a budget with two beside the pinned ones


def budget(model, a_plan, slots):
    whole = account(TINY, a_plan, batch_rows=len(PROMPTS), positions=128)
    return whole.accelerator_bytes - (whole.num_slots - slots) * model.expert_bytes


CASES = {
    "accelerator": (plan(**SLOW), RAGGED),
    "host": (plan(**SLOW, kv_tier="host"), RAGGED),
    "sampled": (plan(**SLOW), RAGGED_SAMPLED),
    "greedy and sampled": (plan(**SLOW), RAGGED[:4] + RAGGED_SAMPLED[4:]),
    "waves": (plan(**SLOW), RAGGED),
    "resident": (plan("resident"), RAGGED),
    "on_demand": (plan("on_demand"), RAGGED),
}


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_of_a_ragged_batch(model, compilations, name):
    a_plan, params = CASES[name]
    if name == "waves":
        a_plan = a_plan.replace(device_memory_bytes=budget(model, a_plan, DISPATCH))
    engine = sm.Engine(model, a_plan)
    state, _ = engine.step(engine.init(PROMPTS, params))
    before, steps, waves = compilations.count, 0, 0
    while not state.done:
        state, info = engine.step(state)
        steps += 1
        waves += info.verify.waves
    assert steps >= 50
    assert (waves > steps * TINY.num_layers) == (name == "waves")
    assert compilations.count == before


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
def test_batches_of_one_call(model, compilations, kv_tier):
    """Three batches, the last padded: all that the first one compiled serves the others."""
    engine = sm.Engine(model, plan(draft_length=4, draft_experts=2, batch_size=3, kv_tier=kv_tier))
    events = engine.stream(PROMPTS, SAMPLED)
    before = None
    for event in events:
        if before is None and event.id == 3:  # the second batch has begun, its prefill included
            before = compilations.count
    assert compilations.count == before
    assert engine.stats()["compilations_after_warmup"] == 0


def test_second_call(model, compilations):
    """Other prompts of the same shapes compile nothing, prefill included."""
    engine = sm.Engine(model, plan(draft_length=4, draft_experts=2))
    engine.generate(PROMPTS, LONG)
    before = compilations.count
    engine.generate([tuple(reversed(prompt)) for prompt in PROMPTS], LONG)
    assert compilations.count == before
    assert engine.stats()["compilations_after_warmup"] == 0


def test_sampling_after_greedy_is_no_recompilation(model):
    """A call that samples needs programs of its own; they are its warm-up, not a recompilation."""
    engine = sm.Engine(model, plan(draft_length=5, draft_experts=2))
    engine.generate(PROMPTS[:3], LONG)
    engine.generate(PROMPTS[:3], SAMPLED)
    assert engine.stats()["compilations_after_warmup"] == 0


def test_the_counter_counts(model, compilations):
    """Negative control: a step of another length in the middle is seen by both counters."""
    engine = sm.Engine(model, plan("on_demand", draft="custom", draft_length=3), draft=Stutter())
    before = compilations.count
    engine.generate(PROMPTS[:2], LONG)
    assert compilations.count > before
    assert engine.stats()["compilations_after_warmup"] > 0


class Stutter:
    """Proposes tokens of another type now and then, which is another program."""

    length = 3

    def __init__(self):
        self._calls = 0

    def propose(self, view):
        self._calls += 1
        kind = np.int8 if self._calls == 9 else np.int32
        return Proposal(tokens=np.zeros((len(view.history), 3), kind), probs=None), view.kv
