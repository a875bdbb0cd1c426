"""The systems of both papers on this machine: speed, bytes, share of the floor, beside what the planner says; one process."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.autotune.choose import Knowledge, as_line, choose
from specmoe_jax.autotune.probe import probe
from specmoe_jax.benchmarks.gpu import settle
from specmoe_jax.benchmarks.specmoeoff import acceptance_of, random_head_of
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Engine
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.roofline import predicted_figures
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.synthetic import NLLB_SKEW
from specmoe_jax.planner.calibration import ASSUMED, Acceptance
from specmoe_jax.planner.estimate import Prediction, predict
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support import tracing
from specmoe_jax.support.errors import UserError
from specmoe_jax.support.timing import CompileCounter, Stopwatch
from specmoe_jax.support.units import GIB

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
        plan = plan.replace(synthetic_acceptance=_acceptance(plan))
    if name != "specmoe":
        return [plan]
    if synthetic:  # affinity would read every expert, and the text means nothing
        plan = plan.replace(synthetic_acceptance=SELF_DRAFT_ACCEPTANCE, substitution="random")
    assert isinstance(plan.draft_experts, int)
    return [plan.replace(draft_experts=n) for n in range(plan.draft_experts, 0, -1)]


def _acceptance(plan: Plan) -> float:
    assert plan.draft_length is not None
    return acceptance_of(plan.draft_length)


def rows(name: str, model: Model, load: Load, link: dict, folder: pathlib.Path, prompts=None, **changes) -> Iterator[dict]:
    """One preset over the batch sizes, largest first. prompts: token ids of many requests; None: random ones."""
    synthetic = changes.get("synthetic", True)
    head = changes.pop("head", None) or (random_head_of(model) if name == "specmoeoff" else None)
    prompts = _random_prompts(model, max(load.batches), load.prompt) if prompts is None else prompts
    for batch in sorted(load.batches, reverse=True):
        given = prompts[:batch]
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


def chosen(model: Model, load: Load, link: dict, folder: pathlib.Path, budget_bytes: int | None) -> Iterator[dict]:
    """What the planner chooses for as many requests as the largest batch, by the papers' acceptance, and how it does."""
    calibration = ASSUMED._replace(acceptance={"self": Acceptance(SELF_DRAFT_ACCEPTANCE), "eagle": Acceptance(acceptance_of(4))})
    known = Knowledge(probe(), _workload(model, load, load.prompt), calibration)
    fixed = {"dtype": model.dtype} | ({"device_memory_bytes": budget_bytes} if budget_bytes else {})
    found = choose(model.config, known, requests=max(load.batches), fixed=fixed, head=True)
    plan, row = found.best.plan, {"question": "planner", "chosen": as_line(found), "layers": model.config.num_layers}
    if plan.drafting.gated:
        plan = plan.replace(synthetic_acceptance=SELF_DRAFT_ACCEPTANCE, substitution="random", guard=False)
    elif plan.drafting.given == "draft_head":
        plan = plan.replace(synthetic_acceptance=_acceptance(plan), guard=False)
    head = random_head_of(model) if plan.drafting.given == "draft_head" else None
    prompts, path = _random_prompts(model, plan.batch_size, load.prompt), folder / "planner_lanes.json"
    yield row | {"plan": dataclasses.asdict(plan)} | measure(model, plan, head, prompts, load, link["bytes_per_s"], path)


def _random_prompts(model: Model, rows: int, tokens: int) -> list[tuple[int, ...]]:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens))
    return [tuple(map(int, row)) for row in ids]


def _workload(model: Model, load: Load, prompt: int) -> Workload:
    skew = NLLB_SKEW if "synthetic_routing" in model.synthetic else ASSUMED.skew
    return Workload(prompt_tokens=max(prompt, 1), new_tokens=load.new, skew=skew)


def _predicted(model: Model, plan: Plan, load: Load, prompt: int) -> Prediction | str:
    """By this machine's rates, as explain.py would say it, with the acceptance that is assumed in the run; or why not."""
    workload = _workload(model, load, prompt)
    if plan.synthetic_acceptance is not None:
        workload = dataclasses.replace(workload, acceptance=plan.synthetic_acceptance)
    elif plan.drafting.drafts:
        workload = dataclasses.replace(workload, acceptance=plan.drafting.assumed_acceptance)
    try:
        return predict(model.config, plan, probe(), workload)
    except UserError as e:
        return str(e)


def measure(
    model: Model, plan: Plan, head: EagleHead | None, prompts, load: Load, link_bytes_per_s: float, lanes: pathlib.Path
) -> dict:
    """Steps until every row is done or the time is over, then a streamed plan's lanes over three more steps of a run of its own.

    With the planner's prediction of it, and whether the measured tokens/s lie in its interval.
    """
    engine, watch = Engine(model, plan, draft_head=head), Stopwatch()
    params = SamplingParams(max_new_tokens=load.new, ignore_eos=True)
    state = engine.init(prompts, params)
    start_s, compiles = watch.seconds, CompileCounter()
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
    predicted = _predicted(model, plan, load, max(map(len, prompts)))
    if isinstance(predicted, str):
        done["not_predicted"] = predicted
    else:
        assert predicted.interval is not None
        low, high = predicted.interval
        inside = low <= figures["decode_tokens_per_s"] <= high
        done |= predicted_figures(predicted, totals) | {"interval": (low, high), "inside_interval": inside}
    del state, engine
    if plan.flow.workers:
        done["lanes_s"] = _lanes(model, plan, head, prompts, params, lanes)
    return figures | done


def _lanes(model: Model, plan: Plan, head, prompts, params, path: pathlib.Path) -> dict[str, float]:
    """Seconds that each lane works in a step; the trace goes to `path`. Noting waits, so these steps are not the measured ones."""
    spans: list[tracing.Span] = []
    engine = Engine(model, plan, draft_head=head, spans=spans)
    state = engine.init(prompts, params)
    spans.clear()
    watch, steps = Stopwatch(), 0
    while steps < 3 and not state.done:
        state, _ = engine.step(state)
        steps += 1
    tracing.write_lanes(spans, path)
    return {lane: busy / steps for lane, busy in tracing.busy_s(spans).items()} | {"wall": watch.seconds / steps}
