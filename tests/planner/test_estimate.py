"""Predictions: every preset, limits that must hold, and the papers' machines (docs/planner.md has the table)."""

import dataclasses

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.planner.estimate import needed, predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS
from tests.planner.planner_cases import MIXTRAL

A30, LARGE = machine("a30"), machine("h200").replace(accelerator_memory_bytes=1e12)
TABLE_3 = Workload(prompt_tokens=512, new_tokens=128, acceptance=EAGLE_MIXTRAL)


def plan(preset, config=MIXTRAL, **changes):
    found = PRESETS[preset](config).replace(dtype="bfloat16", **changes)
    return found.replace(link_bytes_per_s=51e9) if preset == "overlap" else found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_prediction(preset):
    found = predict(MIXTRAL, plan(preset, batch_size=16), LARGE, Workload())
    assert 0 < found.floor_s <= found.iteration_s and found.rows == 16
    low, high = found.interval
    assert low < found.tokens_per_s < high
    assert found.tokens_per_s == pytest.approx(16 * found.tokens_per_step / found.iteration_s)
    assert (found.link_bytes_per_token == 0) == (preset == "resident")
    assert found.prefill_s > 0 and found.busy_s[found.binding] == max(found.busy_s.values())


@pytest.mark.parametrize("name", [*RAW_CONFIGS, *ENCODER_DECODERS])
@pytest.mark.parametrize("preset", ["on_demand", "specmoe"])
def test_every_family_has_a_prediction(name, preset):
    config = parse_config((RAW_CONFIGS | ENCODER_DECODERS)[name])
    work = Workload(prompt_tokens=8, new_tokens=8, source_tokens=8, skew=0.1)
    assert predict(config, plan(preset, config), LARGE, work).tokens_per_s > 0


def test_a_slower_link_gives_fewer_tokens_and_as_many_bytes():
    fast, slow = (predict(MIXTRAL, plan("on_demand"), LARGE.replace(up_bytes_per_s=rate), Workload()) for rate in (5e10, 5e9))
    assert slow.tokens_per_s < fast.tokens_per_s
    assert slow.link_bytes_per_token == fast.link_bytes_per_token


def test_an_emulated_link_is_the_link():
    emulated = predict(MIXTRAL, plan("on_demand", link_bytes_per_s=5e9), LARGE, Workload())
    real = predict(MIXTRAL, plan("on_demand"), LARGE.replace(up_bytes_per_s=5e9), Workload())
    assert emulated.iteration_s == pytest.approx(real.iteration_s, rel=0.01)


def test_prefetch_while_drafting_helps_where_the_link_binds():
    without, with_it = (
        predict(MIXTRAL, plan("specmoe", **change), LARGE, Workload(skew=0.6)) for change in ({}, {"prefetch": "draft"})
    )
    assert with_it.iteration_s < without.iteration_s


def test_experts_on_disk_wait_for_the_disk():
    from_disk = plan("on_demand", expert_tier="disk", host_memory_bytes=20 << 30)
    assert predict(MIXTRAL, from_disk, LARGE, Workload()).binding == "disk"


def test_the_account_is_the_engines_own_and_refuses():
    with pytest.raises(PlanError, match=r"host memory of 190\.0 GiB is too small"):
        predict(parse_config(_large_config()), plan("on_demand"), machine("4090d"), Workload())
    assert needed(MIXTRAL, plan("on_demand"), LARGE, Workload()).host_experts == 256


def _large_config():
    return RAW_CONFIGS["mixtral"] | {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 60}


def test_drafting_without_acceptance_only_costs():
    kept = plan("specmoe")
    assert (
        predict(MIXTRAL, kept, LARGE, Workload(acceptance=0.0)).tokens_per_s
        < predict(MIXTRAL, kept, LARGE, Workload()).tokens_per_s
    )


@pytest.mark.parametrize("name, paper", [("a30", 824), ("4090d", 515)])
def test_the_batch_of_the_paper_fits_its_host_memory(name, paper):
    """SpecMoEOff: 566 + 1024 tokens. The account gives as many rows as have pages, within 5 % of the paper's batch."""
    work = Workload(prompt_tokens=566, new_tokens=1024, acceptance=EAGLE_MIXTRAL)
    found = predict(MIXTRAL, plan("streaming", batch_size=1000), _roomy(machine(name)), work, interval=False)
    assert found.rows == pytest.approx(paper, rel=0.05)


def test_the_iteration_of_the_papers_table_3():
    """Within 15 % of the measured iteration, target and its parts; the drafting is not (docs/planner.md says why)."""
    found = predict(MIXTRAL, plan("specmoeoff", batch_size=2048), A30, TABLE_3, budgets=False, interval=False)
    assert found.iteration_s == pytest.approx(5.05, rel=0.15)
    assert found.iteration_s - found.draft_s == pytest.approx(4.39 + 0.097, rel=0.15)
    assert found.busy_s["cpu attention"] == pytest.approx(4.29, rel=0.15)
    assert found.busy_s["link to accelerator"] == pytest.approx(3.70, rel=0.15)


@pytest.mark.parametrize("base, paper", [("on_demand", 0.233), ("caching", 0.281)])
def test_the_bytes_ratios_of_specmoe(base, paper):
    """NLLB-MoE's decoder: 128 experts, top-2, skew 0.84, batch 256, N = 4, draft length 10, 7.265 tokens per step."""
    config = dataclasses.replace(MIXTRAL, num_experts=128, num_layers=6, expert_hidden=8192, hidden_size=2048)
    work = Workload(acceptance=((10, 6.265),), skew=0.84)
    ours = plan("specmoe", config, batch_size=256, draft_length=10, draft_experts=4)
    bytes_of = [
        predict(config, each, LARGE, work, interval=False).link_bytes_per_token
        for each in (ours, plan(base, config, batch_size=256))
    ]
    assert bytes_of[0] / bytes_of[1] == pytest.approx(paper, rel=0.06)


def _roomy(hardware):
    """The draft's and the target's own limits are the host's here."""
    return hardware.replace(accelerator_memory_bytes=1e12)


def test_the_package_of_the_plan_is_validated():
    with pytest.raises(PlanError, match="draft_length"):
        predict(MIXTRAL, sm.PRESETS["on_demand"](MIXTRAL).replace(draft="ngram"), LARGE, Workload())


@pytest.mark.parametrize("rate, length, rows", [(0.7, 4, 1), (0.7, 4, 16), (0.3, 2, 64), (0.9, 6, 8), (1.0, 4, 8), (0.0, 4, 8)])
def test_the_last_row_ends_later_than_the_mean_one(rate, length, rows):
    """Against drawn runs of 64 tokens a row."""
    rng, wanted, jobs = np.random.default_rng(0), 64, 400
    runs = (rng.random((jobs, rows, wanted, length)) < rate).cumprod(axis=3).sum(axis=3) + 1  # tokens of each step
    ends = (runs.cumsum(axis=2) < wanted).sum(axis=2) + 1  # steps of each row
    drawn = ends.max(axis=1).mean() / ends.mean()
    work = Workload(new_tokens=wanted, acceptance=rate)
    assert work.slowest_row_factor(Plan(preset="p", draft="ngram", draft_length=length), rows) == pytest.approx(drawn, rel=0.06)
    assert work.slowest_row_factor(Plan(preset="p"), rows) == 1.0


def test_the_slowest_row_of_a_map_is_that_of_the_rate_that_gives_it():
    drafted = Plan(preset="p", draft="ngram", draft_length=4)
    rate = Workload(new_tokens=64, acceptance=0.6)
    table = Workload(new_tokens=64, acceptance=((4, rate.accepted(4)),))
    assert table.slowest_row_factor(drafted, 8) == pytest.approx(rate.slowest_row_factor(drafted, 8), rel=1e-6)
