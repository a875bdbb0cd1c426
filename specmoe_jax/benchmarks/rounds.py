"""Plans side by side: every engine keeps one generation alive, and rounds give each of them a slice in turn."""

import functools
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Engine
from specmoe_jax.engine import figures as metrics
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.support.progress import bar
from specmoe_jax.support.timing import CompileCounter, Stopwatch


class Case(NamedTuple):
    """A plan under a name; base: the name of the case that its ratios are taken against. head: of an EAGLE or MTP draft.

    popularity: see Engine. model: of this case, where it is not that of all: the same weights in another form.
    """

    name: str
    plan: Plan
    base: str | None = None
    head: EagleHead | MtpHead | None = None
    popularity: np.ndarray | None = None
    model: Model | None = None

    def engine(self, model: Model, **options) -> Engine:
        model = model if self.model is None else self.model
        options |= {"popularity": self.popularity}
        if isinstance(self.head, MtpHead):
            return Engine(model, self.plan, mtp_head=self.head, **options)
        return Engine(model, self.plan, draft_head=self.head, **options)


class Job(NamedTuple):
    """tokens: new tokens per row and round. settle: rounds before the first that counts. steps: at least, per round.

    temperature: 0 is greedy, which small models answer with repetitions that any draft guesses. progress: a mode of progress.bar.
    """

    prompts: Sequence
    rounds: int
    tokens: int
    settle: int = 1
    steps: int = 1
    temperature: float = 0.0
    progress: str | bool = False


def compare(model: Model, cases: list[Case], job: Job) -> dict[str, dict]:
    """Figures of every case over its measured rounds, with `ratios` to its base, paired round by round.

    The order within a round is shuffled, so that a neighbour's noise falls on nobody in particular.
    """
    engines = {case.name: case.engine(model) for case in cases}
    params = SamplingParams(max_new_tokens=limit(model, job), ignore_eos=True, temperature=job.temperature)
    states, rounds = {}, {case.name: [] for case in cases}
    order, shuffle = [case.name for case in cases], random.Random(0)
    with _bar(job, prefills=len(cases), slices=len(cases)) as shown:
        for name, engine in engines.items():
            states[name] = engine.init(job.prompts, params)
            shown.update()
        compiles = CompileCounter()
        for number in range(job.settle + job.rounds):
            shuffle.shuffle(order)
            if number == job.settle:
                compiles = CompileCounter()
            for name in order:
                states[name], totals = _slice(engines[name], states[name], job)
                shown.update()
                if number >= job.settle:
                    rounds[name].append(totals)
    compiled = {"compilations_after_warmup": compiles.count}  # of all cases together
    return {name: row | compiled for name, row in _table(model, cases, engines, rounds).items()}


def whole_jobs(model: Model, cases: list[Case], job: Job) -> dict[str, dict]:
    """As `compare`, but a round is the whole job: prefill, `job.tokens` new tokens of each request, and the tail.

    job_tokens_per_s: all of it, the median round's.
    """
    engines = {case.name: case.engine(model) for case in cases}
    params = SamplingParams(max_new_tokens=job.tokens, ignore_eos=True, temperature=job.temperature)
    rounds: dict[str, list[metrics.Totals]] = {case.name: [] for case in cases}
    walls: dict[str, list[float]] = {case.name: [] for case in cases}
    order, shuffle = [case.name for case in cases], random.Random(0)
    with _bar(job, slices=len(cases)) as shown:
        for number in range(job.settle + job.rounds):
            shuffle.shuffle(order)
            for name in order:
                infos, watch = [], Stopwatch()
                engines[name].generate(job.prompts, params, on_step=infos.append)
                shown.update()
                if number >= job.settle:
                    walls[name].append(watch.seconds)
                    rounds[name].append(functools.reduce(metrics.add_step, infos, metrics.Totals()))
    table = _table(model, cases, engines, rounds)
    for name, row in table.items():
        row["job_tokens_per_s"] = statistics.median(
            total.new_tokens / wall_s for total, wall_s in zip(rounds[name], walls[name], strict=True)
        )
    return table


def _bar(job: Job, *, slices: int, prefills: int = 0) -> tqdm.tqdm:
    """Over the prefills and the slices of every round."""
    return bar("rounds", prefills + (job.settle + job.rounds) * slices, "slice", mode=job.progress, leave=False)


def _table(model: Model, cases: list[Case], engines: dict[str, Engine], rounds: dict[str, list[metrics.Totals]]) -> dict[str, dict]:
    return {
        case.name: _figures(model, case.plan, rounds[case.name], None if case.base is None else rounds.get(case.base))
        | {"base": case.base, "peak_accelerator_bytes": engines[case.name].stats()["peak_accelerator_bytes"]}
        for case in cases
    }


def limit(model: Model, job: Job) -> int:
    """Tokens per row for all rounds; rows of a speculating batch spread, and none may finish while measuring."""
    wanted = (job.settle + job.rounds) * (job.tokens + 12) * 3 // 2 + 48  # a step more per round, of up to 11 tokens
    return min(wanted, model.config.max_positions - max(map(len, job.prompts)) if not isinstance(job.prompts[0], str) else wanted)


def _slice(engine: Engine, state, job: Job):
    """Steps until the rows have `job.tokens` more tokens each, on average.

    Of a streamed plan the first step does not count: what was on its way while the others ran arrived for nothing.
    """
    if engine.plan.flow.streams_layers and not state.done:
        state, _ = engine.step(state)
    totals, goal = metrics.Totals(), job.tokens * len(job.prompts)
    while not state.done and (totals.new_tokens < goal or totals.steps < job.steps):
        state, info = engine.step(state)
        totals = metrics.add_step(totals, info)
    return state, totals


def _figures(model: Model, plan: Plan, rounds: list[metrics.Totals], base: list[metrics.Totals] | None) -> dict:
    """Figures over the sum of the rounds, the median round's speed, and medians of paired ratios with their range."""
    figures = metrics.figures(
        _sum(rounds),
        plan,
        on_demand_bytes=None,
        link_bytes_per_s=plan.link_bytes_per_s,
        model_stamps=model.synthetic,
    )
    figures["decode_tokens_per_s"] = statistics.median(map(_speed, rounds))
    figures["step_latency_s"] = statistics.median(total.decode_s / total.steps for total in rounds)
    figures["link_bytes_per_step"] = figures["link_bytes"] / figures["steps"]
    figures["prefetch_wasted_share"] = (
        figures["prefetch_wasted_bytes"] / figures["prefetch_bytes"] if figures["prefetch_bytes"] else None
    )
    figures["ratios"] = None if base is None else _ratios(rounds, base)
    return figures


def _ratios(rounds: list[metrics.Totals], base: list[metrics.Totals]) -> dict:
    """[median, least, most] over the rounds, of speed and of bytes per token."""
    speed = [_speed(a) / _speed(b) for a, b in zip(rounds, base, strict=True)]
    sent = [_sent(a) / _sent(b) for a, b in zip(rounds, base, strict=True) if _sent(b)]
    return {
        name: [statistics.median(values), min(values), max(values)] if values else None
        for name, values in (("decode_tokens_per_s", speed), ("link_bytes_per_token", sent))
    }


def _speed(totals: metrics.Totals) -> float:
    return totals.new_tokens / totals.decode_s


def _sent(totals: metrics.Totals) -> float:
    return totals.link_bytes / totals.new_tokens


def _sum(rounds: list[metrics.Totals]) -> metrics.Totals:
    """Field by field; the runs accepted, position by position."""
    longest = max(len(total.accepted_at_least) for total in rounds)
    padded = [total._replace(accepted_at_least=(*total.accepted_at_least, *[0] * longest)[:longest]) for total in rounds]
    columns = zip(*padded, strict=True)
    return metrics.Totals._make(sum(c) if not isinstance(c[0], tuple) else tuple(map(sum, zip(*c, strict=True))) for c in columns)
