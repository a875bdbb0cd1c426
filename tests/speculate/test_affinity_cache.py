"""The affinity table of a checkpoint is computed once; what cannot be trusted or written is done without."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.speculate.hot_experts import affinity_cache
from specmoe_jax.speculate.hot_experts.affinity_cache import affinity_table
from specmoe_jax.testing import tiny


@pytest.fixture(scope="module")
def demo():
    return sm.load_model("demo")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "specmoe_jax" / "affinity"


@pytest.fixture
def computed(monkeypatch):
    """Number of layers computed so far."""
    made, compute = [], affinity_cache.expert_distances

    def spy(*args):
        made.append(args)
        return compute(*args)

    monkeypatch.setattr(affinity_cache, "expert_distances", spy)
    return made


def test_the_second_run_loads(demo, cache, computed):
    first = affinity_table(demo)
    assert len(computed) == demo.config.num_moe_layers and len(os.listdir(cache)) == 1
    np.testing.assert_array_equal(affinity_table(demo), first)
    assert len(computed) == demo.config.num_moe_layers


def test_a_damaged_table_is_computed_anew(demo, cache, computed):
    first = affinity_table(demo)
    (file,) = cache.iterdir()
    file.write_bytes(b"not a table")
    np.testing.assert_array_equal(affinity_table(demo), first)
    assert len(computed) == 2 * demo.config.num_moe_layers
    affinity_table(demo)
    assert len(computed) == 2 * demo.config.num_moe_layers  # it was written again


def test_another_checkpoint_and_another_dtype_have_their_own(demo, cache, computed, tmp_path):
    affinity_table(demo)
    affinity_table(sm.load_model("demo", dtype="bfloat16"))
    other = tmp_path / "other"
    other.mkdir()
    for file in filter(pathlib.Path.is_file, demo.path.iterdir()):
        (other / file.name).write_bytes(file.read_bytes())
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    affinity_table(sm.load_model(str(other)))
    assert len(os.listdir(cache)) == 3 and len(computed) == 3 * demo.config.num_moe_layers


def test_a_random_model_is_not_cached(cache, computed):
    assert affinity_table(tiny()).shape == (3, 5, 5)
    assert affinity_table(tiny()).shape == (3, 5, 5)
    assert len(computed) == 6 and not cache.exists()


def test_a_cache_that_cannot_be_written(demo, cache):
    cache.parent.write_text("a file where the folder should be")
    config = demo.config
    assert affinity_table(demo).shape == (config.num_moe_layers, config.num_experts, config.num_experts)


@pytest.mark.slow
def test_engines_use_it(demo, cache, computed):
    plan = sm.PRESETS["specmoe"](demo.config)
    params = sm.SamplingParams(max_new_tokens=4)
    for changes in ({}, {"draft_length": 2}):
        sm.Engine(demo, plan.replace(**changes)).generate(["Call me Ishmael."], params)
    assert len(computed) == demo.config.num_moe_layers
    sm.Engine(dataclasses.replace(demo, path=None), plan).generate(["Call me"], params)
    assert len(computed) == 2 * demo.config.num_moe_layers


@pytest.mark.slow
def test_an_engine_asks_once(demo, cache, monkeypatch):
    """Also when its pool is made anew for a larger batch."""
    from specmoe_jax.engine.drafts import self_draft

    asked = []
    monkeypatch.setattr(self_draft, "affinity_table", lambda *args, **kwargs: asked.append(1) or affinity_table(*args, **kwargs))
    engine = sm.Engine(demo, sm.PRESETS["specmoe"](demo.config).replace(prefill_chunk=1))
    for count in (1, 8):
        engine.generate(["Call me Ishmael."] * count, sm.SamplingParams(max_new_tokens=2))
    assert len(asked) == 1
