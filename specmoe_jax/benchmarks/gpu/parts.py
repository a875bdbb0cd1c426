"""The parts of `specmoe measure_gpu`: name -> (folder, effort) -> rows. Each runs in a process of that command."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

from specmoe_jax import checkpoints
from specmoe_jax.benchmarks import specmoeoff
from specmoe_jax.benchmarks.gpu import ffn, overlap, peers, presets, settle, shapes, timing
from specmoe_jax.checkpoints import load_head, load_model
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.models.model import PINNED_LIMIT, Model
from specmoe_jax.models.synthetic import NLLB_SHAPED, synthetic_model, synthetic_prompts
from specmoe_jax.support.host_memory import available_bytes

COMMAND = (sys.executable, "-m", "specmoe_jax", "measure_gpu")  # which runs a part in a process of its own
SYSTEMS = ("on_demand", "caching", "specmoe", "streaming", "specmoeoff")
FLAGS = (
    "",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_latency_hiding_scheduler=false",
    "--xla_gpu_enable_command_buffer=",
)


class Effort(NamedTuple):
    """quick: sizes for a CPU. minutes: that a part may take; half of them are for decoding, in equal shares for its batch sizes."""

    quick: bool
    minutes: float

    def share_s(self, batches: int) -> float:
        return 30 * self.minutes / batches


def settle_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    yield timing.machine()
    yield from settle.rows(settle.SMALL if effort.quick else settle.FULL)


def probe_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    yield timing.machine()
    yield from settle.probe(settle.SMALL if effort.quick else settle.FULL)


def limit_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """Twice what the environment's limit allows: does the pool end there?"""
    limit_bytes, piece = int(float(os.environ[PINNED_LIMIT]) * (1 << 30)), 1 << 20 if effort.quick else 1 << 28
    kept, row = [], {"question": "pinned_limit", "limit_bytes": limit_bytes}
    try:
        while sum(a.nbytes for a in kept) < (4 * piece if effort.quick else 2 * limit_bytes):
            kept.append(settle.pinned(piece, jax.devices()[0], 0))
    except Exception as e:  # whatever the runtime says is the answer
        row["refused"] = f"{type(e).__name__}: {str(e)[:300]}"
    yield row | {"held_bytes": sum(a.nbytes for a in kept)}


def flag_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """The probe under each set of flags, and the pool's limit at 2 GB, each in a process of its own; this one touches no device."""
    for part, name, values in (("probe", "XLA_FLAGS", FLAGS), ("limit", PINNED_LIMIT, ("2",))):
        for number, value in enumerate(values):
            own = folder / f"{part}_{number}"
            command = [*COMMAND, f"--here={part}", f"--output={own}", f"--dry_run={effort.quick}"]
            env = os.environ | {name: f"{os.environ.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            path = own / f"{part}.json"
            found = json.loads(path.read_text())["rows"] if path.exists() else []
            yield {"question": "flags", name: value, "exit": done.returncode, "rows": found, "tail": done.stderr[-500:]}


def ffn_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    yield timing.machine()
    yield from ffn.rows(ffn.SMALL if effort.quick else ffn.FULL)


def overlap_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    yield timing.machine()
    yield from overlap.rows(overlap.SMALL if effort.quick else overlap.FULL)


def preset_rows(name: str, folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """One system on the Mixtral-8x7B shape, within 24 GiB of accelerator memory; "planner": what the planner chooses there."""
    link = presets.link_rate(effort.quick)
    yield timing.machine() | link
    model, load = _mixtral(effort)
    budget = None if effort.quick else presets.BUDGET_BYTES  # the small model fits whole, and then nothing would cross the link
    if name == "planner":
        yield from presets.chosen(model, load, link, folder, budget)
    else:
        yield from presets.rows(name, model, load, link, folder, budget_bytes=budget)


def _mixtral(effort: Effort) -> tuple[Model, presets.Load]:
    """Random weights of that shape, with as many layers as host memory holds."""
    if effort.quick:
        return shapes.random_on_device(specmoeoff.MIXTRAL_SHAPED), presets.Load((4,), prompt=8, new=4, seconds=5)
    load = presets.Load((64, 256, 16, 1), prompt=512, new=128, seconds=effort.share_s(4))
    room = available_bytes()
    assert room is not None  # a machine with a GPU tells it
    layers = shapes.layers_that_fit(room, max(load.batches), load.prompt + load.new)
    return shapes.random_on_device(shapes.mixtral_8x7b(layers)), load


def nllb_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """SpecMoE against OnDemand with 128 experts and the published skew, at its largest batch; the sizes are ours, not NLLB's."""
    link, batch = presets.link_rate(effort.quick), 8 if effort.quick else 256
    yield timing.machine() | link
    model = synthetic_model(NLLB_SHAPED, dtype="bfloat16")
    load = presets.Load((batch,), prompt=17, new=8 if effort.quick else 128, seconds=effort.share_s(3))
    prompts = synthetic_prompts(NLLB_SHAPED, batch, load.prompt)
    for name in ("on_demand", "specmoe"):
        yield from presets.rows(name, model, load, link, folder, prompts, budget_bytes=None)


def demo_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """Every preset that needs no emulated link on the bundled model and its held-out text: real acceptance."""
    link = presets.link_rate(effort.quick)
    yield timing.machine() | link
    model = load_model("demo")
    path = pathlib.Path(checkpoints.__file__).parent / "demo" / "held_out.txt"
    texts = [tuple(model.tokenizer.encode(prompt.text)) for prompt in read_prompts(str(path), SamplingParams())]
    load = presets.Load((2,) if effort.quick else (1, 16, 64), prompt=0, new=4 if effort.quick else 64, seconds=effort.share_s(15))
    prompts = [texts[i % len(texts)] for i in range(max(load.batches))]
    for name in (name for name in PRESETS if name != "overlap"):
        head = {"head": load_head("demo", model)} if name == "specmoeoff" else {}
        yield from presets.rows(name, model, load, link, folder, prompts, synthetic=False, budget_bytes=None, **head)


def peer_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    yield timing.machine()
    yield from peers.rows(folder, peers.SMALL if effort.quick else peers.FULL)


def test_rows(folder: pathlib.Path, effort: Effort) -> Iterator[dict]:
    """The suite once, on whatever device there is."""
    tests = ["tests/test_rooms.py"] if effort.quick else ["tests"]
    root = pathlib.Path(__file__).resolve().parents[3]  # of a checkout, the only place that has them
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=root, capture_output=True, text=True)
    yield {"question": "tests", "exit": done.returncode, "tail": done.stdout.splitlines()[-60:]}


PARTS = {
    "settle": settle_rows,
    "flags": flag_rows,
    "ffn": ffn_rows,
    "overlap": overlap_rows,
    **{f"mixtral_{name}": functools.partial(preset_rows, name) for name in (*SYSTEMS, "planner")},
    "nllb": nllb_rows,
    "demo": demo_rows,
    "peers": peer_rows,
    "tests": test_rows,
}
INNER = {"probe": probe_rows, "limit": limit_rows}
