"""The parts of `specmoe measure_gpu`, each a process of that command: name -> rows and time limit; and which parts are a run."""

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from specmoe_jax.autotune.probe import probe
from specmoe_jax.benchmarks.gpu import exact, ffn, overlap, peers, presets, record, settle, shapes, timing
from specmoe_jax.benchmarks.gpu.presets import Case, Load
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.model import Model
from specmoe_jax.models.synthetic import synthetic_prompts
from specmoe_jax.support.timing import Stopwatch

GROUPED = "grouped experts"  # the row that later parts heed: without agreement they run XLA's loop
COMMAND = (sys.executable, "-m", "specmoe_jax", "measure_gpu")  # which runs a part in a process of its own


class Effort(NamedTuple):
    """folder: of the rows. quick: sizes for a CPU. host_bytes: the memory that the machine is said to have; None: not said."""

    folder: pathlib.Path
    quick: bool
    host_bytes: int | None


class Part(NamedTuple):
    """seconds: after which it is ended; it plans for less."""

    rows: Callable[[Effort], Iterator[dict]]
    seconds: float


def device_rows(effort: Effort) -> Iterator[dict]:
    """What this machine is, and whether every flow gives the tokens of the CPU."""
    yield timing.machine(effort.host_bytes)
    yield from exact.rows(exact.FLOWS[1:3] if effort.quick else exact.FLOWS)


def link_rows(effort: Effort) -> Iterator[dict]:
    yield from settle.rows(settle.SMALL if effort.quick else settle.FULL)


def attention_rows(effort: Effort) -> Iterator[dict]:
    yield from overlap.rows(overlap.SMALL if effort.quick else overlap.FULL)


def machine_rows(effort: Effort) -> Iterator[dict]:
    """Whether the grouped products are right, and the machine as the planner knows it, in OUTPUT/machine.json (--hardware)."""
    yield from record.asked(GROUPED, lambda: iter([{"question": GROUPED} | ffn.check()]))
    found = probe(fresh=True)
    found = found.replace(host_memory_bytes=float(effort.host_bytes)) if effort.host_bytes else found
    (effort.folder / "machine.json").write_text(found.to_json() + "\n", encoding="utf-8")
    yield {"question": "planner's machine", "file": "machine.json", "up_bytes_per_s": found.up_bytes_per_s}


def stream_rows(effort: Effort) -> Iterator[dict]:
    """SpecMoEOff beside plain streaming on Mixtral's layers: shares of the link's bound, and what each lane does."""
    config = shapes.small(shapes.mixtral_8x7b(2)) if effort.quick else shapes.mixtral_8x7b(4)
    load = Load(8, 16, 0) if effort.quick else Load(512, 128, 10)
    batches = (4,) if effort.quick else (256, 64)
    order = [Case(name, batch, traced=batch == batches[0]) for batch in batches for name in ("streaming", "specmoeoff")]
    yield from _systems("mixtral", effort, shapes.random_on_device, config, load, order, head=True)


def nllb_rows(effort: Effort) -> Iterator[dict]:
    """SpecMoE beside its baselines where the link decides: 128 experts of NLLB's size with the published skew."""
    config = shapes.small(shapes.NLLB_LINK_BOUND) if effort.quick else shapes.NLLB_LINK_BOUND
    yield from _systems("nllb", effort, shapes.skewed_on_device, config, Load(17, 128, 0 if effort.quick else 3), _cases(effort))


def qwen_rows(effort: Effort) -> Iterator[dict]:
    """The same systems on small experts, of which a token chooses many."""
    config = shapes.small(shapes.qwen3_30b(2)) if effort.quick else shapes.qwen3_30b(12)
    yield from _systems("qwen3", effort, shapes.random_on_device, config, Load(17, 128, 0 if effort.quick else 4), _cases(effort))


def _cases(effort: Effort) -> list[Case]:
    """The paper's comparison at its largest batch first; the other baseline last."""
    batches = (4,) if effort.quick else (256, 16, 1)
    return [Case(name, batch) for names in (("on_demand", "specmoe"), ("caching",)) for batch in batches for name in names]


def _systems(
    name: str,
    effort: Effort,
    make: Callable[[ModelConfig], Model],
    config: ModelConfig,
    load: Load,
    cases: list[Case],
    *,
    head: bool = False,
) -> Iterator[dict]:
    """Each case on one model, whose weights are made here."""
    watch = Stopwatch()
    record.say(f"{name}: makes {config.num_layers} layers")
    model = make(config)
    link = presets.link_rate(effort.quick)
    needed = sum(block.nbytes for blocks in model.experts for block in blocks)
    yield link | {"model": name, "setup_s": watch.seconds, "host_expert_bytes": needed}
    lent = shapes.random_head(model) if head else None
    prompts = synthetic_prompts(config, 256, load.prompt) if "synthetic_routing" in model.synthetic else None
    for case in cases:
        given = lent if case.preset == "specmoeoff" else None

        def measured(case=case, given=given) -> Iterator[dict]:
            for row in presets.rows(case, model, load, link, effort.folder, prompts, given):
                yield {"model": name} | row

        yield from record.asked(f"{name}: {case.name}", measured)


def peer_rows(effort: Effort) -> Iterator[dict]:
    yield from peers.rows(effort.folder, peers.SMALL if effort.quick else peers.FULL)


def ffn_rows(effort: Effort) -> Iterator[dict]:
    yield from ffn.rows(ffn.SMALL if effort.quick else ffn.FULL)


PARTS = {
    "device": Part(device_rows, 70),
    "link": Part(link_rows, 45),
    "attention": Part(attention_rows, 20),
    "streaming": Part(stream_rows, 165),
    "machine": Part(machine_rows, 30),
    "nllb": Part(nllb_rows, 100),
    "qwen3": Part(qwen_rows, 100),
    "peers": Part(peer_rows, 55),
    "ffn": Part(ffn_rows, 45),
}


def grouped_failed(rows: list[dict]) -> bool:
    """Whether the rows of a folder say that this machine must do without the grouped products."""
    asked = [row for row in rows if row.get("part") == "machine"]
    return bool(asked) and not any(row.get("question") == GROUPED and row["agrees"] for row in asked)


RUNS = {1: ("device", "link", "machine", "streaming", "attention"), 2: ("machine", "nllb", "qwen3", "ffn", "peers")}
