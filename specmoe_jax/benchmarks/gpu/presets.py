"""The systems of both papers on this machine: speed, bytes, share of the link's floor; every figure of one process."""

import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax import metrics, tracing
from specmoe_jax.benchmarks.gpu import settle
from specmoe_jax.benchmarks.specmoeoff import acceptance_of, random_head_of
from specmoe_jax.config import GIB, Plan, SamplingParams, preset
from specmoe_jax.engine import Engine
from specmoe_jax.errors import UserError
from specmoe_jax.models.eagle import EagleHead
from specmoe_jax.models.model import Model

BUDGET_BYTES = 24 * GIB
SELF_DRAFT_ACCEPTANCE = 0.913  # SpecMoE's, of NLLB-MoE


class Load(NamedTuple):
    """prompt, new: tokens of a request. seconds: that one batch size may decode for; what it got by then is what is told."""

    batches: tuple[int, ...]
    prompt: int
    new: int
    seconds: float


def link_rate(quick: bool) -> dict:
    """Bytes per second of eager copies into the accelerator with nothing beside them: the floor that shares are taken of."""
    sizes = settle.SMALL if quick else settle.FULL
    row = settle.transfer("to_device", sizes.pieces[-1], 2, True, sizes, jax.devices()[0])
    return {"question": "link", "bytes_per_s": row["bytes_per_s"]}


def plans(name: str, model: Model, batch: int, budget_bytes: int | None = BUDGET_BYTES, *, synthetic: bool = True) -> list[Plan]:
    """The plan of a preset for a batch; where its resident experts may not fit the budget, those with fewer after it."""
    plan = preset(name, model.config).replace(batch_size=batch, dtype=model.dtype, device_memory_bytes=budget_bytes)
    plan = plan.replace(micro_batches=plan.micro_batches if batch % plan.micro_batches == 0 else 1)
    if synthetic and name == "specmoeoff":
        plan = plan.replace(synthetic_acceptance=acceptance_of(plan.draft_length))
    if name != "specmoe":
        return [plan]
    if synthetic:  # affinity would read every expert, and the text means nothing
        plan = plan.replace(synthetic_acceptance=SELF_DRAFT_ACCEPTANCE, substitution="random")
    return [plan.replace(draft_experts=n) for n in range(plan.draft_experts, 0, -1)]


def rows(name: str, model: Model, load: Load, link: dict, folder: pathlib.Path, prompts=None, **changes) -> Iterator[dict]:
    """One preset over the batch sizes, largest first. prompts: token ids of many requests; None: random ones."""
    synthetic = changes.get("synthetic", True)
    head = changes.pop("head", None) or (random_head_of(model) if name == "specmoeoff" else None)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (max(load.batches), load.prompt))
    for batch in sorted(load.batches, reverse=True):
        given = [tuple(map(int, row)) for row in ids[:batch]] if prompts is None else prompts[:batch]
        for plan in plans(name, model, batch, **changes):
            row = {"question": "preset", "preset": name, "batch": batch, "layers": model.config.num_layers}
            row |= {"draft_experts": plan.draft_experts, "prompt_tokens": max(map(len, given)), "real_text": not synthetic}
            try:
                yield row | measure(model, plan, head, given, load, link["bytes_per_s"], folder / f"{name}_{batch}_lanes.json")
                break
            except UserError as e:
                yield row | {"refused": str(e)}
            except jax.errors.JaxRuntimeError as e:  # memory, most likely: the smaller batches are still to be measured
                yield row | {"failed": str(e)[:500]}
                break


def measure(
    model: Model, plan: Plan, head: EagleHead | None, prompts, load: Load, link_bytes_per_s: float, lanes: pathlib.Path
) -> dict:
    """Steps until every row is done or the time is over, then a streamed plan's lanes over three more steps of a run of its own."""
    engine, watch = Engine(model, plan, draft_head=head), metrics.Stopwatch()
    params = SamplingParams(max_new_tokens=load.new, ignore_eos=True)
    state = engine.init(prompts, params)
    start_s, compiles = watch.seconds, metrics.CompileCounter()
    totals, deadline_s = metrics.Totals(), time.perf_counter() + load.seconds
    while not state.done and time.perf_counter() < deadline_s:
        state, info = engine.step(state)
        totals = metrics.add_step(totals, info)
    figures = metrics.figures(totals, plan, on_demand_bytes=None, link_bytes_per_s=link_bytes_per_s, model_stamps=model.synthetic)
    done = {
        "init_s": start_s,
        "complete": state.done,
        "link_bytes_per_s": link_bytes_per_s,
        "compilations_after_warmup": compiles.count,
        "peak_accelerator_bytes": engine.stats()["peak_accelerator_bytes"],
    }
    del state, engine
    if plan.expert_flow == "stream":
        done["lanes_s"] = _lanes(model, plan, head, prompts, params, lanes)
    return figures | done


def _lanes(model: Model, plan: Plan, head, prompts, params, path: pathlib.Path) -> dict[str, float]:
    """Seconds that each lane works in a step; the trace goes to `path`. Noting waits, so these steps are not the measured ones."""
    spans: list[tracing.Span] = []
    engine = Engine(model, plan, draft_head=head, spans=spans)
    state = engine.init(prompts, params)
    spans.clear()
    watch, steps = metrics.Stopwatch(), 0
    while steps < 3 and not state.done:
        state, _ = engine.step(state)
        steps += 1
    tracing.write_lanes(spans, path)
    return {lane: busy / steps for lane, busy in tracing.busy_s(spans).items()} | {"wall": watch.seconds / steps}
