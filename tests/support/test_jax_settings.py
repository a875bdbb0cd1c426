"""Settings of JAX: a program's own debugging of its code does not stop the library, and programs are kept between runs."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import specmoe_jax as sm
from specmoe_jax.support import jax_settings
from specmoe_jax.testing import TINY, tiny

PROMPTS = [[1, 2, 3], [4, 5]]
PARAMS = sm.SamplingParams(max_new_tokens=4, temperature=0.5, ignore_eos=True)


def generated(preset, **changes):
    plan = sm.PRESETS[preset](TINY).replace(batch_size=2, deterministic_sampling=True, **changes)
    return [completion.token_ids for completion in sm.Engine(tiny(), plan).generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("preset", ["specmoe", "streaming"])
def test_settings_for_debugging_are_of_the_programs_own_code(preset, monkeypatch):
    """JAX_NUMPY_RANK_PROMOTION=raise and JAX_TRANSFER_GUARD=disallow, which hold for all threads."""
    expected, column, row = generated(preset), jnp.ones((2, 1)), jnp.ones(2)
    settings = {"jax_numpy_rank_promotion": "raise", "jax_transfer_guard_host_to_device": "disallow"}
    settings["jax_transfer_guard_device_to_host"] = "disallow"
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        assert generated(preset) == expected
        engine = sm.Engine(tiny(), sm.PRESETS[preset](TINY))
        for _ in engine.stream(PROMPTS, PARAMS):  # between two events the settings are the program's
            with pytest.raises(ValueError, match="rank_promotion"):
                _ = column + row
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


CODE = """
import jax, specmoe_jax as sm
from specmoe_jax.testing import TINY, tiny
sm.Engine(tiny(), sm.PRESETS["resident"](TINY))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.slow
def test_programs_are_kept_for_everyone_who_has_an_engine(tmp_path):
    """The docs promise it; it was so for commands alone. A folder that somebody chose stays."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMP", "JAX_PERS"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def folder(**more):
        return subprocess.check_output([sys.executable, "-c", CODE], env=environment | more, text=True).strip()

    assert folder() == str(tmp_path / "specmoe_jax" / "xla")
    assert folder(JAX_COMPILATION_CACHE_DIR="/tmp/own") == "/tmp/own"


def test_a_folder_of_programs_that_somebody_chose_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before is not None  # conftest.py
    jax_settings.use_compile_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_the_library_tells_what_it_does_to_whoever_asks(caplog):
    with caplog.at_level(logging.INFO, "specmoe_jax"):
        sm.Engine(tiny(), sm.PRESETS["resident"](TINY)).generate(PROMPTS, sm.SamplingParams(max_new_tokens=1))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("specmoe_jax.")]
    assert any(line.startswith("plan: Plan(preset='resident'") for line in said)
    assert any(line.startswith("compiled the steps of 2 rows") for line in said)
