"""A job that takes more memory than there is is refused before it takes any."""

import pytest

import specmoe_jax as sm
from specmoe_jax.engine import resources
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY, tiny

PARAMS = sm.SamplingParams(max_new_tokens=2, ignore_eos=True)


def test_a_job_beyond_the_free_memory_is_refused(monkeypatch):
    engine = sm.Engine(tiny(), sm.PRESETS["resident"](TINY).replace(batch_size=2))
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    with pytest.raises(sm.PlanError, match="beside the loaded model, but 1000 bytes of memory are free"):
        engine.generate([[5, 6, 7]], PARAMS)
    monkeypatch.setattr(resources, "available_bytes", lambda: 1 << 30)
    engine.generate([[5, 6, 7]], PARAMS)
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    engine.generate([[5, 6, 7]], PARAMS)  # what the job before it took is there


def test_an_accelerator_of_its_own_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    monkeypatch.setattr(resources, "accelerator_is_cpu", lambda: False)
    plan = sm.PRESETS["resident"](TINY)
    resources._check_room(plan, account(TINY, plan, batch_rows=1, positions=64), held=None)
