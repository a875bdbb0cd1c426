"""Prompts that attend on the accelerator give the tokens of those that attend on the CPU, however they come into the pass."""

import dataclasses
import functools

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run

import specmoe_jax as sm
from specmoe_jax.engine.requests.prepare import batch_shape_of, make_requests
from specmoe_jax.kv_cache.positions import PREFILL_TOKENS, prefill_rows
from specmoe_jax.models.model import random_model
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.workload import Workload
from specmoe_jax.testing import TINY, byte_tokenizer, eagle_head, tiny
from tests.planner.planner_cases import MIXTRAL

ON = {"prefill_attention": "accelerator"}


@functools.cache
def expected():
    return run(tiny(), plan("resident", batch_size=8))[0]


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_chunked_prompts_give_the_tokens_of_the_resident_preset(chunk, micro_batches):
    got, stats = run(tiny(), plan("streaming", batch_size=8, micro_batches=micro_batches, prefill_chunk=chunk, **ON))
    assert got == expected()
    assert stats["compilations_after_warmup"] == 0


def test_a_model_of_one_layer_compiles_nothing_after_its_warm_up():
    """Only a second chunk finds the rows that the first has left: no second layer does so in the warm-up."""
    model = random_model(dataclasses.replace(TINY, num_layers=1), seed=2, dtype="float32", tokenizer=byte_tokenizer())
    a_plan = sm.PRESETS["streaming"](model.config).replace(batch_size=2, micro_batches=1, prefill_chunk=4, **ON)
    got, stats = run(model, a_plan)
    assert got == run(model, sm.PRESETS["resident"](model.config).replace(batch_size=8))[0]
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("rows, micro_batches", [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("draft", [{}, {"draft": "ngram", "draft_length": 2}])
def test_rows_refilled_from_a_queue(rows, micro_batches, draft):
    changes = {"batch_size": rows, "micro_batches": micro_batches, "prefill_chunk": 4, "pinned_layers": 1, **draft, **ON}
    got, stats = run(tiny(), plan("streaming", **changes), PROMPTS * 3)
    assert got == expected() * 3
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("tree", [{}, {"draft_tree_top_k": 2, "draft_tree_tokens": 5}])
def test_an_eagle_head_learns_of_prompts(tree):
    changes = {"batch_size": 3, "draft_length": 3, "prefill_chunk": 8, "micro_batches": 1, **tree}
    on, stats = run(tiny(), plan("specmoeoff", **changes, **ON), PROMPTS * 2, draft_head=eagle_head(tiny()))
    _, off = run(tiny(), plan("specmoeoff", **changes, prefill_attention="cpu"), PROMPTS * 2, draft_head=eagle_head(tiny()))
    assert on == expected() * 2
    assert stats["compilations_after_warmup"] == 0
    assert stats["acceptance_by_position"] == off["acceptance_by_position"]


def test_sampled_tokens():
    want, _ = run(tiny(), plan("resident", batch_size=8), params=SAMPLED)
    assert run(tiny(), plan("streaming", batch_size=3, micro_batches=3, **ON), params=SAMPLED)[0] == want


def test_a_later_job_of_other_lengths():
    engine = sm.Engine(tiny(), plan("streaming", batch_size=8, prefill_chunk=8, **ON))
    for prompts, want in ((PROMPTS[:2], expected()[:2]), (PROMPTS, expected()), (PROMPTS[:1], expected()[:1])):
        assert [done.token_ids for done in engine.generate(prompts, GREEDY)] == want


def test_only_keys_and_values_cross_and_the_lanes_say_so():
    sent, lanes = {}, {}
    for where in ("cpu", "accelerator"):
        spans = []
        engine = sm.Engine(tiny(), plan("streaming", batch_size=8, prefill_attention=where), spans=spans)
        engine.init(PROMPTS, GREEDY)
        sent[where] = engine._resources.runtime.context.activations.sent_bytes
        lanes[where] = {(span.kind, span.lane) for span in spans if span.kind in ("attend_chunk", "append")}
    assert lanes == {"cpu": set(), "accelerator": {("attend_chunk", "accelerator"), ("append", "cpu attention")}}
    keys = 2 * TINY.num_kv_heads
    both = 2 * TINY.num_heads + keys  # queries down and what they attended up
    tokens = prefill_tokens(engine)
    item = TINY.num_layers * TINY.head_dim * 4
    assert sent["cpu"] - sent["accelerator"] == tokens * (both - keys) * item


def prefill_tokens(engine) -> int:
    """Of the prompts' items with their padding: those of the warm-up and those of the job."""
    shapes = batch_shape_of(engine.plan, make_requests(engine.model, PROMPTS, GREEDY))
    width = prefill_rows(shapes.rows, shapes.chunk)
    groups = -(-(len(PROMPTS) - 1) // width)  # the prompt of one token has nothing to fill
    return (1 + groups) * width * shapes.chunk


def test_the_account_counts_the_staged_rows():
    a_plan = sm.PRESETS["streaming"](MIXTRAL).replace(batch_size=64, dtype="bfloat16", prefill_chunk=64)
    sizes = {
        where: account(MIXTRAL, a_plan.replace(prefill_attention=where), batch_rows=64, positions=2048)
        for where in ("cpu", "accelerator")
    }
    rows = PREFILL_TOKENS // 64
    staged = 2 * rows * 2048 * MIXTRAL.num_kv_heads * MIXTRAL.head_dim * 2
    assert sizes["accelerator"].staging_bytes == staged
    assert sizes["accelerator"].accelerator_bytes - sizes["cpu"].accelerator_bytes == staged
    assert sizes["accelerator"].host_bytes == sizes["cpu"].host_bytes


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_what_is_staged_is_within_the_account(chunk):
    engine = sm.Engine(tiny(), plan("streaming", batch_size=8, prefill_chunk=chunk, **ON))
    state = engine.init(PROMPTS, GREEDY)
    rows = min(8, PREFILL_TOKENS // state.kv.chunk)
    assert state.kv.staged % state.kv.chunk == 0 and state.kv.staged >= max(map(len, PROMPTS)) - 1
    staged = 2 * rows * state.kv.staged * TINY.num_kv_heads * TINY.head_dim * 4
    assert staged <= engine._resources.account.staging_bytes


def test_where_prompts_attend_is_left_to_the_machine():
    """Measured: where the accelerator is the CPU, its own kernel is faster."""
    assert sm.Engine(tiny(), plan("streaming")).plan.prefill_attention == "cpu"
    assert plan("streaming").resolved(accelerator_is_cpu=False).prefill_attention == "accelerator"
    assert plan("on_demand").resolved(accelerator_is_cpu=False).prefill_attention is None
    with pytest.raises(sm.PlanError, match="no effect"):
        plan("on_demand", **ON).validate(TINY)
    with pytest.raises(sm.PlanError, match="one of cpu, accelerator"):
        plan("streaming", prefill_attention="gpu").validate(TINY)


def test_the_prediction_knows_the_lane():
    """On a machine with an accelerator a long prompt that attends on the CPU is slower."""
    a_plan = sm.PRESETS["streaming"](MIXTRAL).replace(batch_size=64, dtype="bfloat16")
    work = Workload(prompt_tokens=8192, new_tokens=128)
    cpu, accelerator = (
        predict(MIXTRAL, a_plan.replace(prefill_attention=where), machine("a30"), work, budgets=False, interval=False)
        for where in ("cpu", "accelerator")
    )
    assert accelerator.prefill_s < cpu.prefill_s
    assert accelerator.iteration_s == cpu.iteration_s
    assert np.isclose(accelerator.account.accelerator_bytes - cpu.account.accelerator_bytes, accelerator.account.staging_bytes)
