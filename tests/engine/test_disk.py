"""Experts on disk under a RAM budget: the same tokens, every byte read counted, the budget kept."""

import dataclasses
import threading

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run, steps, tokens_of

import specmoe_jax as sm
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.engine.requests.prepare import check_job
from specmoe_jax.offload.tiers import DiskTier
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY, write_tiny

EXPERTS = TINY.num_layers * TINY.num_experts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The tiny model in both layouts."""
    folder = tmp_path_factory.mktemp("tiny")
    huggingface = folder / "huggingface"
    huggingface.mkdir()
    write_tiny(huggingface)
    return {"huggingface": huggingface, "specmoe": convert(str(huggingface), folder / "specmoe", to="specmoe")}


@pytest.fixture(scope="module", params=["huggingface", "specmoe"])
def on_disk(checkpoints, request):
    return sm.load_model(str(checkpoints[request.param]), expert_tier="disk")


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


def disk_plan(preset="specmoe", experts=EXPERTS // 3, **changes):
    budget = experts * 3 * TINY.expert_hidden * TINY.hidden_size * 4
    return plan(preset, expert_tier="disk", host_memory_bytes=budget, **changes)


CASES = {
    "on_demand": {"preset": "on_demand"},
    "caching": {"preset": "caching"},
    "resident": {"preset": "resident"},
    "lru": {"dram_policy": "lru"},
    "one expert": {"experts": 1},
    "all": {"experts": EXPERTS},
    "prefetch": {"prefetch": "draft"},
    "prefetch, one expert": {"prefetch": "draft", "experts": 1},
    "ngram": {"preset": "on_demand", "draft": "ngram", "draft_length": 3},
    "bypass": {"bypass_page_cache": True},
    "small chunks": {"prefill_chunk": 2, "batch_size": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_resident_model(on_disk, resident, case):
    tokens, stats = run(on_disk, disk_plan(**CASES[case]))
    assert tokens == resident
    assert (stats["disk_bytes"] + stats["prefill_disk_bytes"]) % on_disk.expert_bytes == 0
    assert stats["prefill_disk_bytes"] > 0


@pytest.mark.slow
def test_sampled_tokens(on_disk, model):
    assert run(on_disk, disk_plan(), params=SAMPLED)[0] == run(model, plan(), params=SAMPLED)[0]


@pytest.mark.parametrize("experts", [1, 4])
def test_what_is_read_is_what_was_missing(on_disk, experts):
    """Demanded experts only: each one that crosses the link is a hit, or a miss and one read."""
    engine = sm.Engine(on_disk, disk_plan(experts=experts))
    for _, _, info in steps(engine):
        assert info.below.hits + info.below.misses == info.verify.fetched
        assert info.below.disk_bytes == info.below.misses * on_disk.expert_bytes
        assert len(engine._resources.runtime.experts.store.tier._blocks) <= experts


def test_a_cache_for_all_reads_each_once(on_disk):
    _, stats = run(on_disk, disk_plan(experts=EXPERTS))
    assert stats["disk_bytes"] + stats["prefill_disk_bytes"] <= EXPERTS * on_disk.expert_bytes
    assert stats["disk_bytes_per_token"] == stats["disk_bytes"] / stats["new_tokens"]


@pytest.mark.slow
def test_the_cache_shrinks_beside_a_larger_batch(on_disk, resident):
    """A second job with more KV cache in host memory leaves the experts less of the budget."""
    one, three = (account(TINY, disk_plan("on_demand", kv_tier="host", experts=99), batch_rows=n, positions=64) for n in (1, 3))
    budget = one.host_bytes - one.host_expert_bytes + 14 * on_disk.expert_bytes
    left = int(budget - (three.host_bytes - three.host_expert_bytes)) // on_disk.expert_bytes
    assert 1 <= left < 14
    engine = sm.Engine(on_disk, disk_plan("on_demand", kv_tier="host").replace(host_memory_bytes=budget))
    for count, capacity in ((1, 14), (3, left), (1, left)):
        assert tokens_of(engine.generate(PROMPTS[:count], GREEDY)) == resident[:count]
        assert engine._resources.runtime.experts.store.tier._capacity == capacity


def test_a_streamed_plan_runs_within_every_budget(on_disk, resident):
    """Also one that is nearly enough for all experts: the pages of the cache take what they need and no more."""
    a_plan = disk_plan("streaming", batch_size=8)
    whole = check_job(on_disk, a_plan.replace(host_memory_bytes=1e12), PROMPTS, GREEDY)
    for budget in (whole.host_bytes - 1, whole.host_bytes - 7 * whole.expert_bytes):
        assert run(on_disk, a_plan.replace(host_memory_bytes=budget))[0] == resident


def test_a_stream_finds_most_of_a_cache_that_is_nearly_large_enough(on_disk):
    """All experts in every pass: what went by last is what is needed last."""
    a_plan = disk_plan("streaming", batch_size=8)
    whole = check_job(on_disk, a_plan.replace(host_memory_bytes=1e12), PROMPTS, GREEDY)
    engine = sm.Engine(on_disk, a_plan.replace(host_memory_bytes=whole.host_bytes - 1))
    engine.generate(PROMPTS, GREEDY)
    tier = engine._resources.runtime.experts.store.tier
    assert tier._capacity == tier.num_experts - 1
    assert tier.counts.hits > 0.7 * (tier.counts.hits + tier.counts.misses)


def test_every_read_of_a_streamed_job_is_in_the_figures(on_disk):
    """Also those of the link's thread between two steps."""
    engine = sm.Engine(on_disk, disk_plan("streaming", batch_size=3, experts=40))
    for _ in engine.stream(PROMPTS, GREEDY):
        engine._resources.runtime.context.workers.link.submit(lambda: None).result()
    stats, tier = engine.stats(), engine._resources.runtime.experts.store.tier
    assert stats["disk_bytes"] + stats["prefill_disk_bytes"] == tier.counts.disk_bytes
    assert stats["dram_hits"] + stats["dram_misses"] <= tier.counts.hits + tier.counts.misses


def test_a_streamed_plan_reads_in_one_thread(on_disk, resident, monkeypatch):
    """The tier's decisions are one caller's: the pinned layers of a job must not meet the stream of one that was given up."""
    threads, request = set(), DiskTier.request

    def spy(tier, keys):
        threads.add(threading.current_thread().name)
        request(tier, keys)

    monkeypatch.setattr(DiskTier, "request", spy)
    engine = sm.Engine(on_disk, disk_plan("streaming", batch_size=8, pinned_layers=1, experts=40))
    for _ in engine.stream(PROMPTS, GREEDY):
        break
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == resident
    assert threads == {"specmoe-link_0"}


def test_predicted_experts_are_read_ahead(on_disk):
    """The draft's gates say what will be needed, so some demanded experts are in host memory already."""
    whole = disk_plan(experts=8, draft_experts=2)
    _, without = run(on_disk, whole)
    _, ahead = run(on_disk, whole.replace(prefetch="draft"))
    assert ahead["dram_misses"] < without["dram_misses"]


@pytest.mark.slow
def test_bfloat16_is_converted_once_it_is_read(checkpoints):
    in_memory = sm.load_model(str(checkpoints["huggingface"]), dtype="bfloat16")
    on_disk = sm.load_model(str(checkpoints["huggingface"]), dtype="bfloat16", expert_tier="disk")
    np.testing.assert_array_equal(on_disk.experts[1][2], in_memory.experts[1][2])
    tokens, _ = run(on_disk, disk_plan(dtype="bfloat16"), PROMPTS[:2])
    assert tokens == run(in_memory, plan(dtype="bfloat16"), PROMPTS[:2])[0]


def test_the_reference_runs_from_disk(on_disk, model):
    tokens = np.array([PROMPTS[2]])
    np.testing.assert_array_equal(on_disk.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"host_memory_bytes": None}, "host_memory_bytes"),
        ({"host_memory_bytes": 100.0}, "too small to cache one expert"),
        ({"dram_policy": "random"}, "dram_policy"),
    ],
)
def test_plans_that_cannot_run(on_disk, changes, message):
    with pytest.raises(sm.PlanError, match=message):
        sm.Engine(on_disk, dataclasses.replace(disk_plan(), **changes))


@pytest.mark.parametrize("changes", [{"dram_policy": "lru"}, {"bypass_page_cache": True}])
def test_options_without_effect(model, changes):
    with pytest.raises(sm.PlanError, match="no effect"):
        sm.Engine(model, plan(**changes))


def test_plan_and_model_must_agree(on_disk, model):
    with pytest.raises(sm.PlanError, match="expert_tier=disk"):
        sm.Engine(model, disk_plan())
    with pytest.raises(sm.PlanError, match="expert_tier=host"):
        sm.Engine(on_disk, plan())
    with pytest.raises(sm.RequestError, match="expert_tier"):
        sm.load_model("demo", expert_tier="tape")


def test_a_small_host_budget_names_the_disk(model):
    with pytest.raises(sm.PlanError, match="expert_tier=disk"):
        sm.Engine(model, plan(host_memory_bytes=1000.0))
