"""Profiling and calibration on tiny models: every operator gets a cost, what was found is kept, damaged caches are not."""

import math

import pytest

import specmoe_jax as sm
from specmoe_jax.autotune import calibrate
from specmoe_jax.autotune import profile as profiling
from specmoe_jax.autotune.choose import Knowledge, evaluate, job_of
from specmoe_jax.cli.shown.stats_table import table
from specmoe_jax.engine.figures import Totals
from specmoe_jax.engine.roofline import predicted_figures, roofline_figures
from specmoe_jax.models.eagle.network import random_head
from specmoe_jax.ops.cpu import _ffi
from specmoe_jax.planner.drafts.eagle import usual_head
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.measured.operators import WORK, LinearCost, Operators
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.cache_files import write_cached
from specmoe_jax.testing import TINY, tiny

PARAMS = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
KNOWN = Knowledge(hardware=machine("a30").replace(accelerator_is_cpu=True), workload=Workload(prompt_tokens=8, new_tokens=6))


@pytest.mark.slow
def test_every_operator_is_measured_once(short_profile, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiling.cached_profile(TINY, "float32") is None
    found = profiling.profile(TINY)
    assert set(found.costs) == set(WORK) and found.expert_bytes == tiny().expert_bytes
    for cost in found.costs.values():
        assert cost.constant >= 0 and min(cost.coefficients) >= 0 and math.isfinite(cost.error)
    assert profiling.cached_profile(TINY, "float32") == found == profiling.profile(TINY)
    assert profiling.cached_profile(TINY, "bfloat16") is None


@pytest.mark.slow
def test_a_heads_chains_and_trees_are_calibrated(monkeypatch):
    monkeypatch.setattr(calibrate, "NEW_TOKENS", 5)
    head = random_head(usual_head(TINY), tiny())
    found = calibrate.calibrate(tiny(), ["Call me", "a"], PARAMS, head=head)
    assert set(found.acceptance) == {"self", "ngram", "eagle", "eagle_tree"}
    assert all(0 <= known.rate <= 1 for known in found.acceptance.values())


@pytest.mark.parametrize("variable, value", [("SPECMOE_THREADS", "1"), ("SPECMOE_ISA", "portable"), ("SPECMOE_CPU_OPS", "ref")])
def test_other_kernels_are_measured_anew(monkeypatch, tmp_path, variable, value):
    """What was measured on one thread, or of an earlier build, was taken for the machine's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = Operators({name: LinearCost(work, 1e-4, (1e-7,) * len(work), 0.0) for name, work in WORK.items()}, 4000, 0.05)
    write_cached("operators", profiling._key(TINY, "float32"), cached.to_dict())
    assert profiling.cached_profile(TINY, "float32") == cached
    monkeypatch.setenv(variable, value)
    _ffi.module.cache_clear()
    try:
        assert profiling.cached_profile(TINY, "float32") is None
    finally:
        monkeypatch.undo()
        _ffi.module.cache_clear()


def test_calibration_is_kept_for_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "NEW_TOKENS", 5)
    found = calibrate.calibrate(tiny(), ["Call me", "a"], PARAMS)
    assert set(found.acceptance) == {"self", "ngram"} and found.measured and 0 <= found.skew < 1
    assert all(0 <= known.rate <= 1 for known in found.acceptance.values())
    assert not list(tmp_path.rglob("calibration/*"))  # a random model has no checkpoint


@pytest.mark.parametrize("name", ["resident", "on_demand", "specmoe", "streaming"])
def test_the_floor_of_a_run(name):
    plan = sm.PRESETS[name](TINY).replace(batch_size=2)
    engine = sm.Engine(tiny(), plan)
    assert engine.stats(KNOWN.hardware)["fraction_of_floor"] is None
    engine.generate(["Call me", "a"], PARAMS)
    stats = engine.stats(KNOWN.hardware, evaluate(TINY, plan, KNOWN))
    parts = stats["floor_parts_s"]
    assert stats["floor_s"] == max(parts.values()) and stats["binding_resource"] == max(parts, key=parts.get)
    assert stats["fraction_of_floor"] == pytest.approx(stats["floor_s"] / stats["decode_s"])
    assert parts["link"] == pytest.approx(stats["link_bytes"] / KNOWN.hardware.up_bytes_per_s)
    assert stats["predicted"]["step_s"] > 0 and stats["step_s"] == pytest.approx(stats["decode_s"] / stats["steps"])
    for share, doubted in ((0.9, False), (1.2, True)):
        shown = " ".join(table(stats | {"fraction_of_floor": share, "load_s": 0.0}).split())
        assert f"{share:.2f} of what" in shown and ("above 1" in shown) is doubted


def test_the_floor_by_hand():
    """Two steps of one row of three verified tokens over caches of 10 and 12 positions, TINY's shapes."""
    totals = Totals(steps=2, row_steps=2, new_tokens=4, verified_tokens=6, context=22, decode_s=1.0, link_bytes=10**6)
    hardware = machine("a30")
    parts = roofline_figures(TINY, sm.PRESETS["on_demand"](TINY), totals, hardware)["floor_parts_s"]
    assert parts["link"] == 10**6 / hardware.up_bytes_per_s
    positions = 11 + 3 / 2  # cached, and half of the new ones
    assert parts["cache reads"] == pytest.approx(2 * 3 * 2 * positions * 3 * 8 * 4 / hardware.accelerator_bytes_per_s)
    dense = 40 * 8 * (6 + 3 + 3 + 6) + 40 * 5  # projections and router
    experts = 2 * 3 * 2  # passes, layers, choices of one token: at least so many are read
    weights = 2 * (3 * dense + 40 * 263) + experts * TINY.expert_params
    assert parts["weight reads"] == pytest.approx(weights * 4 / hardware.accelerator_bytes_per_s)
    assert parts["weight and cache reads"] == parts["weight reads"] + parts["cache reads"]
    counted = roofline_figures(TINY, sm.PRESETS["on_demand"](TINY), totals._replace(hits=10, misses=9), hardware)["floor_parts_s"]
    more = 7 * TINY.expert_params * 4 / hardware.accelerator_bytes_per_s
    assert counted["weight reads"] == pytest.approx(parts["weight reads"] + more)
    per_token = 3 * (2 * dense + 2 * 2 * TINY.expert_params + 4 * positions * 6 * 8) + 2 * 40 * 263
    assert parts["accelerator"] == pytest.approx(6 * per_token / hardware.accelerator_flops_float32)
    prediction = evaluate(TINY, sm.PRESETS["on_demand"](TINY), KNOWN)
    assert predicted_figures(prediction, totals)["step_s"] == 0.5


def test_the_job_of_some_prompts():
    assert job_of(tiny().tokenizer, ["abc", "abcde", ""], [4, 8]) == (4, 6)
    assert job_of(None, [(1, 2)], []) == (2, 1)
