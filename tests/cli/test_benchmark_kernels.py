"""The kernel benchmark: the forms that it compares agree, its batches are what it says, and every table runs."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.benchmarks import attention_kernels, cold_rounds, expert_kernels
from specmoe_jax.ops.xla.experts import tiles

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "benchmark_kernels.py"
SMALL = ["--batch=2", "--heads=2,1,16", "--dtype=float32", "--new_tokens=2", "--length=64", "--rounds=3", "--threads=1"]


@pytest.fixture(autouse=True)
def kernels():
    if not ops.isas():
        pytest.skip("the compiled kernels are not usable here")


@pytest.mark.slow
def test_every_table_runs():
    flags = [*SMALL, "--only=rows,one_by_one,ref", "--layers=2:4:16:8", "--tokens=1,64", "--matrices=24:16", "--dense_rows=3"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["not_measured"] == {}
    assert [row["table"] for row in report["rows"]] == [
        "attention",
        *["ffn"] * 2,
        *["packed"] * 4,
        "dense",
        *["overhead"] * 2,
        "ragged",
    ]
    for row in report["rows"]:
        for name, difference in row.get("max_difference", {}).items():
            assert difference < 1e-4, (row["case"], name)
    attention, one_token, many, *packed, dense, call, append, ragged = report["rows"]
    assert set(attention["ms"]) == {"packed", "rows", "one_by_one", "ref"}
    assert set(one_token["times_slower"]) == {"tiles", "pairs"} and set(many["times_slower"]) == {"tiles", "dense"}
    assert [row["packing"] for row in packed] == ["int8", "int8", "int4", "int4"] and dense["rows"] == 3
    assert one_token["bytes_read"] == 2 * 2 * 6 * 16 * 8  # two experts in each of two layers
    assert call["calls"] == attention_kernels.CALLS and set(append["ms"]) == {"no_append", "append"}
    assert ragged["length_sum"] == 64 + 4096


@pytest.mark.slow
def test_an_unknown_table_is_refused():
    done = subprocess.run([sys.executable, SCRIPT, "--tables=speed"], capture_output=True, text=True)
    assert done.returncode != 0 and "--tables has 'speed'" in done.stderr + done.stdout


@pytest.mark.parametrize("form", ["pairs", "dense", "tiles"])
def test_the_forms_of_xla_are_exact(form):
    layers = expert_kernels.Layers(calls=3, experts=4, M=32, F=24)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 32), np.float32))
    slots = jnp.asarray(rng.integers(0, 4, (3, 5, 2)) + 4 * np.arange(3)[:, None, None], jnp.int32)
    forms = {
        "pairs": expert_kernels.pairs,
        "dense": functools.partial(expert_kernels.dense, experts=4),
        "tiles": functools.partial(tiles, ffn=None),
    }
    blocks = expert_kernels.weights(layers)
    run = lambda f: jax.jit(functools.partial(expert_kernels.through_layers, f))(x, blocks, slots)  # noqa: E731
    np.testing.assert_allclose(run(forms[form]), run(ops.expert_ffn), rtol=2e-6, atol=2e-6)


def test_slow_rows_have_fewer_rounds_but_three():
    rounds = cold_rounds.Rounds(count=5, seconds=1e-9, threads=1)
    seconds, limits = cold_rounds.interleave({"a": lambda: None, "b": lambda: sum(range(10000))}, rounds)
    assert [len(x) for x in (*seconds.values(), *limits.values())] == [3] * 4
    assert cold_rounds.ratios({"a": [1, 2, 4], "b": [3, 4, 4]}, "a") == {"b": 2.0}
