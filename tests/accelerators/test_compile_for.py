"""What the compilers for a GPU and a TPU make of the engine's programs, without either."""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
CUDA, TPU = "jax_plugins.xla_cuda13", "libtpu"
COMPILERS = {"h200": CUDA, "v5e": TPU, "v5e_8": TPU}


def is_there(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def outcome(target: str) -> dict:
    """Of compile_for.py."""
    compiler = COMPILERS[target]
    if not is_there(compiler):
        pytest.skip(f"needs the wheels of {compiler} on PYTHONPATH, see .ci/run")
    paths = [HERE, HERE.parent / "engine", HERE.parent.parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, HERE / "compile_for.py", target], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes():
    """Each compiler works through its targets, beside the other."""
    pools = {compiler: concurrent.futures.ThreadPoolExecutor(1) for compiler in (CUDA, TPU)}
    yield {target: pools[compiler].submit(outcome, target) for target, compiler in COMPILERS.items()}
    for pool in pools.values():
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module", params=["h200", "v5e"])
def found(request, outcomes):
    return outcomes[request.param].result()


@pytest.fixture(scope="module")
def programs(found):
    return [program for program in found["programs"] if program["plan"] != "control"]


def test_every_program_compiles(programs):
    assert len(programs) > 100
    assert [program for program in programs if program["failed"]] == []


def test_no_program_waits_for_the_link(found, programs):
    """One that did would hold up all after it: experts arrive beside the programs."""
    assert [program["name"] for program in found["programs"] if program["waits_for_link"]] == ["_write_slots"]  # the control
    assert {program["name"] for program in programs if program["waits_for_link"]} == set()


def test_no_program_copies_an_expert(found, programs):
    """Neither in float32 nor as it is: the grouped products read it where it lies in the pool."""
    temp = [(program["name"], program["temp_bytes"]) for program in programs if program["plan"].startswith("half")]
    assert [(name, size) for name, size in temp if size > 0.9 * found["expert_bytes"]] == []


def test_programs_of_four_devices(found, programs):
    """Experts are each device's own in a TPU's description of four chips; a GPU's is of one."""
    if found["devices"] < 4:
        pytest.skip("it describes one device")
    mesh = [program for program in programs if "mesh" in program["plan"]]
    assert {"draft_chain", "experts_and_attention", "experts"} <= {program["name"] for program in mesh}
    assert any(program["collective"] for program in mesh)
    divided = [program for program in mesh if program["divides_rows"]]
    assert {"attention", "draft_chain", "experts_and_attention", "head"} <= {program["name"] for program in divided}


def test_programs_of_eight_devices(outcomes):
    """Of a TPU's description of eight chips: they compile, exchange outputs, and none waits for the link."""
    programs = outcomes["v5e_8"].result()["programs"]
    assert [program for program in programs if program["failed"]] == []
    assert {"draft_chain", "experts", "experts_and_attention"} <= {program["name"] for program in programs}
    assert any(program["divides_rows"] for program in programs)
    assert any(program["collective"] for program in programs) and not any(program["waits_for_link"] for program in programs)
