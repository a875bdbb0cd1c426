"""What a GPU's compiler makes of the engine's programs, without a GPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")


@pytest.fixture(scope="module")
def found():
    if PLUGIN is None:
        pytest.skip("needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt on PYTHONPATH, see .ci/run")
    paths = [HERE, HERE.parent / "engine", HERE.parent.parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, HERE / "compile_for_cuda.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def programs(found):
    return [program for program in found["programs"] if program["plan"] != "control"]


def test_every_program_compiles(programs):
    assert len(programs) > 100
    assert [program for program in programs if program["failed"]] == []


def test_no_program_waits_for_the_link(found, programs):
    """On a GPU one that did would hold up all after it: experts arrive beside the programs."""
    assert [program["name"] for program in found["programs"] if program["waits_for_link"]] == ["_write_slot"]  # the control
    assert {program["name"] for program in programs if program["waits_for_link"]} == set()


def test_no_program_makes_a_float32_copy_of_an_expert(found, programs):
    temp = {program["name"]: program["temp_bytes"] for program in programs if program["plan"].startswith("half")}
    assert temp["experts"] >= found["expert_bytes"]  # XLA cuts the expert out of the pool: a copy, in its own dtype
    assert {name: size for name, size in temp.items() if size > 1.5 * found["expert_bytes"]} == {}
