"""A draft whose cache is split between accelerator and host: no token changes, nor what is drafted, nor does anything compile."""

import dataclasses

import numpy as np
import pytest
from engine_cases import plan, tokens_of

import specmoe_jax as sm
from specmoe_jax.engine.drafts.split_draft import SplitDraft
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.models.eagle.network import head_bytes, position_bytes
from specmoe_jax.testing import eagle_head

PROMPTS = [tuple(int(t) for t in np.random.default_rng([8, i]).integers(0, 256, 10 + 7 * i % 52)) for i in range(12)]
PARAMS = [sm.SamplingParams(max_new_tokens=6 + 5 * i % 23, ignore_eos=True) for i in range(12)]
ROWS = 4  # a queue three times the batch; rows grow from one page to two


@pytest.fixture(scope="module")
def expected(model):
    return tokens_of(sm.Engine(model, plan("resident", batch_size=12)).generate(PROMPTS, PARAMS))


def split_plan(model, pages=None, **changes):
    """pages: of the accelerator, None for all of the cache there."""
    budget = None if pages is None else pages * KV_PAGE * position_bytes(eagle_head(model))
    return plan("specmoeoff", **({"batch_size": ROWS, "draft_length": 3, "draft_kv_bytes": budget} | changes))


def generate(model, a_plan, **head):
    engine, infos = sm.Engine(model, a_plan, draft_head=eagle_head(model, **head)), []
    tokens = tokens_of(engine.generate(PROMPTS, PARAMS, on_step=infos.append))
    return tokens, engine.stats(), infos


CASES = {
    "one page": (1, {"micro_batches": 1}),
    "two pages": (2, {"micro_batches": 2}),
    "five pages": (5, {"micro_batches": 4}),
    "three micro-batches": (4, {"micro_batches": 3, "batch_size": 6, "prefill_chunk": 8}),
    "length one": (3, {"draft_length": 1}),
    "guard": (5, {"guard": True}),
    "tree": (5, {"draft_tree_top_k": 2, "draft_tree_tokens": 5}),
    "tree, micro-batches": (2, {"draft_tree_top_k": 3, "draft_tree_tokens": 6, "micro_batches": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_lossless_and_compiled_once(model, expected, case):
    pages, changes = CASES[case]
    tokens, stats, infos = generate(model, split_plan(model, pages, **changes))
    assert tokens == expected
    assert stats["compilations_after_warmup"] == 0
    assert 0 < stats["draft_cpu_row_share"] <= 1
    assert sum(info.draft_on_cpu for info in infos) == round(stats["draft_cpu_row_share"] * sum(i.active.sum() for i in infos))


@pytest.mark.slow
@pytest.mark.parametrize("tree", [{}, {"draft_tree_top_k": 2, "draft_tree_tokens": 5}], ids=["chain", "tree"])
def test_what_is_drafted_is_what_it_was(model, tree):
    """Whatever is where, the same is accepted at each position; and rows really change sides, few times each."""
    _, whole, _ = generate(model, split_plan(model, **tree))
    assert whole["draft_moves"] == whole["draft_cpu_row_share"] == 0
    moves = []
    for pages in (2, 5, 7):
        _, stats, _ = generate(model, split_plan(model, pages, **tree))
        assert stats["acceptance_by_position"] == whole["acceptance_by_position"]
        moves.append(stats["draft_moves"])
    assert max(moves) > 0 and max(moves) <= 3 * len(PROMPTS)


@pytest.mark.slow
def test_features_of_three_layers(model, expected):
    assert generate(model, split_plan(model, 3), fused=True)[0] == expected


@pytest.mark.slow
def test_a_device_budget_splits_by_itself(model, expected):
    """What is left beside the rest is the draft's; nothing is refused for the draft's cache alone."""
    _, whole, _ = generate(model, split_plan(model))
    page, head = KV_PAGE * position_bytes(eagle_head(model)), eagle_head(model)
    cache = head_bytes(head, batch_rows=ROWS, positions=128) - head_bytes(head, batch_rows=ROWS, positions=0)
    short = split_plan(model, device_memory_bytes=whole["peak_accelerator_bytes"] - cache + 5 * page)
    tokens, stats, _ = generate(model, short)
    explicit = generate(model, split_plan(model, 5))[1]
    assert tokens == expected
    assert stats["peak_accelerator_bytes"] == short.device_memory_bytes == explicit["peak_accelerator_bytes"]
    assert stats["draft_moves"] == explicit["draft_moves"] > 0
    with pytest.raises(sm.PlanError, match="device memory"):
        generate(model, split_plan(model, device_memory_bytes=short.device_memory_bytes - 6 * page))


def test_the_account_is_what_is_made(model):
    engine = sm.Engine(model, split_plan(model, 5), draft_head=eagle_head(model))
    state = engine.init(PROMPTS[4:8], PARAMS[4:8])  # of up to two pages each
    memory, account = state.draft_memory, engine._resources.account
    assert memory.here.num_bytes == account.draft_kv_bytes and memory.there.num_bytes == account.host_draft_bytes
    assert account.host_draft_bytes == account.kv_pages * account.draft_kv_bytes // 5
    while not state.done:
        state, _ = engine.step(state)
        table = state.draft_memory.pages.table
        used = table[table >= 0]
        assert len(set(used.tolist())) == len(used) <= 5


def test_a_budget_below_a_page_is_refused(model):
    with pytest.raises(sm.PlanError, match=r"one page of the draft's cache.*draft_kv_bytes="):
        generate(model, split_plan(model, 0.5))


@pytest.mark.parametrize(
    "preset, changes",
    [("streaming", {}), ("on_demand", {"draft": "eagle", "draft_length": 2}), ("streaming", {"draft": "ngram", "draft_length": 2})],
)
def test_a_budget_without_effect_is_refused(model, preset, changes):
    with pytest.raises(sm.PlanError, match=r"draft_kv_bytes=1000000\.0 has no effect with draft="):
        plan(preset, draft_kv_bytes=1e6, **changes).validate(model.config)


@pytest.mark.slow
def test_a_job_leaves_nothing_of_its_draft_to_the_next(model):
    """Each has a draft of its own, which knows the devices: not the runtime, which would know the draft of the job before."""
    engine = sm.Engine(model, split_plan(model, 1), draft_head=eagle_head(model))
    for _ in range(2):
        engine.generate(PROMPTS[:2], PARAMS[:2])
    draft = engine._resources.runtime.draft
    held = [getattr(draft, field.name) for field in dataclasses.fields(draft)]
    assert isinstance(draft, SplitDraft) and not any(isinstance(value, Runtime | SplitDraft) for value in held)
