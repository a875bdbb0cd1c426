"""The systems of both papers on this machine: speed, bytes, share of the floor, beside what the planner says; one process."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.autotune.probe import probe
from specmoe_jax.benchmarks.gpu import profile, record, settle, shapes
from specmoe_jax.benchmarks.specmoeoff import acceptance_of
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Engine
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.roofline import predicted_figures
from specmoe_jax.engine.state import State
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.synthetic import NLLB_SKEW
from specmoe_jax.planner.calibration import ASSUMED
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support import tracing
from specmoe_jax.support.errors import UserError
from specmoe_jax.support.timing import CompileCounter, Stopwatch

SELF_DRAFT_ACCEPTANCE = 0.913  # SpecMoE's, of NLLB-MoE


class Load(NamedTuple):
    """prompt, new: tokens of a request. seconds: that one batch size may decode for; what it got by then is what is told."""

    prompt: int
    new: int
    seconds: float


class Case(NamedTuple):
    """budget_bytes: of accelerator memory; None: what the plan can use. traced: whether the lanes' trace is kept."""

    preset: str
    batch: int
    budget_bytes: int | None = None
    synthetic: bool = True
    traced: bool = False

    @property
    def name(self) -> str:
        return f"{self.preset}, batch {self.batch}"


def link_rate(quick: bool) -> dict:
    """Bytes per second of eager copies into the accelerator with nothing beside them: the floor that shares are taken of."""
    sizes = settle.SMALL if quick else settle.FULL
    return {"question": "link", "bytes_per_s": settle.alone("to_device", sizes.pieces[-1], 2, sizes)["bytes_per_s"]}


def plans(case: Case, model: Model) -> list[Plan]:
    """The plan of a case; where its resident experts may not fit the budget, those with fewer after it."""
    name, batch = case.preset, case.batch
    plan = preset(name, model.config).replace(batch_size=batch, dtype=model.dtype, device_memory_bytes=case.budget_bytes)
    plan = plan.replace(micro_batches=plan.micro_batches if batch % plan.micro_batches == 0 else 1)
    if case.synthetic and name == "specmoeoff":
        plan = plan.replace(synthetic_acceptance=acceptance_of(plan.draft_length or 0))
    if name != "specmoe":
        return [plan]
    if case.synthetic:  # affinity would read every expert, and the text means nothing
        plan = plan.replace(synthetic_acceptance=SELF_DRAFT_ACCEPTANCE, substitution="random")
    assert isinstance(plan.draft_experts, int)
    return [plan.replace(draft_experts=n) for n in range(plan.draft_experts, 0, -1)]


def rows(case: Case, model: Model, load: Load, link: dict, folder: pathlib.Path, prompts=None, head=None) -> Iterator[dict]:
    """The row of a case. prompts: token ids of at least as many requests; None: random ones."""
    given = (random_prompts(model, case.batch, load.prompt) if prompts is None else prompts)[: case.batch]
    head = head or (shapes.random_head(model) if case.preset == "specmoeoff" else None)
    for plan in plans(case, model):
        row = {"question": "preset", "preset": case.preset, "batch": case.batch, "layers": model.config.num_layers}
        row |= {"draft_experts": plan.draft_experts, "prompt_tokens": max(map(len, given)), "real_text": not case.synthetic}
        row |= {"budget_bytes": case.budget_bytes}
        try:
            yield from measure(row, case, model, plan, head, given, load, link["bytes_per_s"], folder)
            return
        except UserError as e:
            yield row | {"refused": str(e)}


def measure(
    row: dict,
    case: Case,
    model: Model,
    plan: Plan,
    head: EagleHead | None,
    prompts,
    load: Load,
    link_bytes_per_s: float,
    folder: pathlib.Path,
) -> Iterator[dict]:
    """Steps until every row is done or the time is over, with the planner's prediction of them; then where a step's time goes."""
    watch, compiles = Stopwatch(), CompileCounter()
    engine = Engine(model, plan, draft_head=head)
    state = engine.init(prompts, SamplingParams(max_new_tokens=load.new, ignore_eos=True))
    start = {"init_s": watch.seconds, "init_compilations": compiles.count, "init_compile_s": compiles.seconds}
    compiled = f"{compiles.seconds:.1f} of them for compiling {compiles.count} programs"
    record.say(f"{case.name}: ready after {watch.seconds:.1f} s, {compiled}")
    compiles, totals, deadline_s, steps_s = CompileCounter(), metrics.Totals(), time.perf_counter() + load.seconds, []
    while not state.done and (time.perf_counter() < deadline_s or totals.steps < 2):
        state, info = engine.step(state)
        totals = metrics.add_step(totals, info)
        steps_s.append(info.step_s)
    figures = metrics.figures(totals, plan, on_demand_bytes=None, link_bytes_per_s=link_bytes_per_s, model_stamps=model.synthetic)
    row |= figures | start | host_figures(model, totals, link_bytes_per_s)
    row |= {
        "complete": state.done,
        "median_step_s": statistics.median(steps_s),
        "link_bytes_per_s": link_bytes_per_s,
        "compilations_after_warmup": compiles.count,
        "peak_accelerator_bytes": engine.stats()["peak_accelerator_bytes"],
    }
    yield row | predicted(model, plan, load, max(map(len, prompts)), figures, totals)
    if not state.done:
        where = {"question": "step", "preset": case.preset, "batch": case.batch}
        yield where | (lanes(engine, state, case, folder) if plan.flow.workers else one_step(engine, state))


def host_figures(model: Model, totals: metrics.Totals, link_bytes_per_s: float) -> dict:
    """What a step takes beyond its copies at the link's rate, for each layer of a pass and each expert that crossed."""
    beyond_s = totals.decode_s - totals.link_bytes / link_bytes_per_s
    experts = totals.link_bytes // model.expert_bytes
    return {
        "beyond_link_s_per_step": beyond_s / totals.steps,
        "beyond_link_s_per_layer": beyond_s / totals.steps / model.config.num_moe_layers,
        "beyond_link_s_per_expert": beyond_s / experts if experts else None,
        "experts_per_step": experts / totals.steps,
    }


def predicted(model: Model, plan: Plan, load: Load, prompt: int, figures: dict, totals: metrics.Totals) -> dict:
    """By this machine's rates, as explain.py would say it, with the acceptance assumed in the run; or why not."""
    skew = NLLB_SKEW if "synthetic_routing" in model.synthetic else ASSUMED.skew
    workload = Workload(prompt_tokens=max(prompt, 1), new_tokens=load.new, skew=skew)
    if plan.synthetic_acceptance is not None:
        workload = dataclasses.replace(workload, acceptance=plan.synthetic_acceptance)
    elif plan.drafting.drafts:
        workload = dataclasses.replace(workload, acceptance=plan.drafting.assumed_acceptance)
    try:
        prediction = predict(model.config, plan, probe(), workload)
    except Exception as e:  # the measurement that it stands beside is worth more
        return {"not_predicted": f"{type(e).__name__}: {e}"}
    assert prediction.interval is not None
    low, high = prediction.interval
    inside = low <= figures["decode_tokens_per_s"] <= high
    return predicted_figures(prediction, totals) | {"interval": (low, high), "inside_interval": inside}


def lanes(engine: Engine, state: State, case: Case, folder: pathlib.Path) -> dict:
    """Seconds that each lane of a streamed pass works in a step. Noting waits, so these steps are not the measured ones."""
    spans: list[tracing.Span] = []
    runtime = state.runtime
    context = dataclasses.replace(runtime.context, workers=runtime.context.workers._replace(spans=spans))
    state = state._replace(runtime=dataclasses.replace(runtime, context=context))
    watch, steps = Stopwatch(), 0
    while steps < 3 and not state.done:
        state, _ = engine.step(state)
        steps += 1
    wall_s = watch.seconds
    if case.traced:
        tracing.write_lanes(spans, folder / f"{case.preset}_{case.batch}_lanes.json")
    return {"lanes_s": {lane: busy / steps for lane, busy in tracing.busy_s(spans).items()} | {"wall": wall_s / steps}}


def one_step(engine: Engine, state: State) -> dict:
    """A step under the profiler: dispatches, and where the time between copies goes."""
    return profile.profiled(lambda: jax.block_until_ready(engine.step(state)[0].kv))


def random_prompts(model: Model, rows: int, tokens: int) -> list[tuple[int, ...]]:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens))
    return [tuple(map(int, row)) for row in ids]
