"""Seconds of a step from the measured operators of this machine and model (operators.py). Pure.

The costs are those of the programs that run, so nothing is assumed about peaks; what is added up is what the engine does
(engine/forward.py, engine/drafting.py), and for expert_flow=stream its own list of tasks is simulated (SpecMoEOff 5.3, step 4).
"""

import functools
import math
from typing import NamedTuple

from specmoe_jax.config import ModelConfig, Plan
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.operators import Operators
from specmoe_jax.planner.pipeline import UP, Task, pass_tasks, spread
from specmoe_jax.planner.routing import choice_probabilities, distinct, missed
from specmoe_jax.planner.simulate import naive_seconds, simulate
from specmoe_jax.planner.workload import Workload

GATES_RIGHT = 0.8  # of a pass's misses, the share that the draft's gates foresee (prefetch=draft)


class Case(NamedTuple):
    """What a step meets. rows: that run. context: mean positions in their caches.

    probabilities: [E] descending, that a token chooses an expert, the mean over layers. slots: R of the memory account, and
    wanted_slots with which every dispatch fits at once; pinned_layers: of it too. row_share, run_share: how much of an
    independent token's choice one more row makes, and one more position of the same row.
    """

    rows: float
    context: float
    probabilities: tuple[float, ...]
    slots: int
    wanted_slots: int
    pinned_layers: int = 0
    row_share: float = 1.0
    run_share: float = 1.0

    def choosing(self, new: int) -> float:
        """Tokens of a pass of `new` positions, as many as if they chose independently."""
        return choosing(self.rows, new, self.row_share, self.run_share)


def choosing(rows: float, new: float, row_share: float, run_share: float) -> float:
    """Tokens that choose independently and need as many different experts as `rows` rows of `new` positions."""
    return (1 + row_share * (rows - 1)) * (1 + run_share * (new - 1))


class StepTimes(NamedTuple):
    """Seconds of a step. naive_s: of all of it, by the maximum over the resources layer by layer.

    link_s, link_bytes: of the experts. misses: experts fetched.
    """

    draft_s: float
    verify_s: float
    other_s: float
    naive_s: float
    link_s: float
    link_bytes: float
    misses: float

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s + self.other_s


class _Pass(NamedTuple):
    verify_s: float
    naive_s: float
    link_s: float
    misses: float


def step_times(config: ModelConfig, plan: Plan, operators: Operators, case: Case, *, shared_cores: bool) -> StepTimes:
    """A step of a plan that drafts its whole length. shared_cores: the accelerator's tasks and the CPU's run on the same cores.

    Deviations: kv_tier=host without streaming is taken as the accelerator's; a dense layer as the attention of one with experts.
    """
    drafted_s = draft_seconds(config, plan, operators, case)
    flow = {"resident": _resident, "on_demand": _on_demand, "stream": functools.partial(_stream, shared_cores=shared_cores)}
    passed = flow[plan.expert_flow](config, plan, operators, case, drafted_s)
    after_s = operators.seconds("head", tokens=case.rows * plan.tokens_per_pass)
    other_s = operators.seconds("step", rows=case.rows)
    return StepTimes(
        draft_s=drafted_s,
        verify_s=passed.verify_s + after_s,
        other_s=other_s,
        naive_s=passed.naive_s + after_s + other_s,
        link_s=passed.link_s,
        link_bytes=passed.misses * operators.expert_bytes,
        misses=passed.misses,
    )


def draft_seconds(config: ModelConfig, plan: Plan, operators: Operators, case: Case) -> float:
    """`draft_length` tokens of every row, one after the other."""
    length, rows = plan.draft_length or 0, case.rows
    if plan.draft in ("none", "custom") or not length:
        return 0.0
    if plan.draft == "ngram":
        return operators.seconds("lookup", rows=rows)
    choice_s = operators.seconds("draft_head", rows=rows)
    if plan.draft == "eagle":  # a dense layer, and one more look at what was committed
        layer_s = operators.seconds("attention", **_work(rows, 1, case.context))
        return length * (layer_s + choice_s) + operators.seconds("attention", **_work(rows, plan.tokens_per_pass, case.context))
    blocks = min(_mean_pinned(plan), distinct(case.probabilities, rows))
    layers_s = _layers_seconds(config, operators, rows, 1, case.context, blocks)
    return length * (layers_s + choice_s + operators.seconds("drafted_token", rows=rows, read=rows * case.context))


def _work(rows: float, new: float, context: float) -> dict[str, float]:
    return {"rows": rows, "tokens": rows * new, "read": rows * context, "scores": rows * new * context}


def _layers_seconds(config: ModelConfig, operators: Operators, rows: float, new: float, context: float, blocks: float) -> float:
    """All layers, with their experts at hand."""
    work = _work(rows, new, context)
    dense = config.num_layers - config.num_moe_layers
    return config.num_moe_layers * operators.seconds("layer", blocks=blocks, **work) + dense * operators.seconds(
        "attention", **work
    )


def _resident(config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float) -> _Pass:
    new = plan.tokens_per_pass
    blocks = distinct(case.probabilities, case.choosing(new))
    seconds = _layers_seconds(config, operators, case.rows, new, case.context, blocks)
    return _Pass(verify_s=seconds, naive_s=drafted_s + seconds, link_s=0.0, misses=0.0)


def _on_demand(config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float) -> _Pass:
    """Layer by layer: attention, then the misses over the link, then the experts."""
    new, layers = plan.tokens_per_pass, config.num_moe_layers
    work = _work(case.rows, new, case.context)
    tokens = case.choosing(new)
    used, misses = distinct(case.probabilities, tokens), missed(case.probabilities, tokens, kept_experts(config, plan, case))
    expert_s = operators.expert_bytes / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
    ahead = min(GATES_RIGHT * misses, drafted_s / expert_s / layers) if plan.prefetch == "draft" and expert_s else 0.0
    copied = misses - ahead
    waves = max(1, math.ceil(used / max(case.slots - _pinned(config, plan), 1))) if case.slots < case.wanted_slots else 1
    without_s = operators.seconds("on_demand_layer", blocks=used, misses=0, **work)
    with_s = operators.seconds("on_demand_layer", blocks=used, misses=copied, **work)
    link_s = misses * expert_s if expert_s else with_s - without_s
    waves_s = (waves - 1) * (operators.costs["experts"].constant + operators.costs["migrate"].constant)
    layer_s = max(with_s, without_s + copied * expert_s) + waves_s
    naive_s = max(without_s + waves_s, link_s)
    dense_s = (config.num_layers - layers) * operators.seconds("attention", **work)
    return _Pass(layers * layer_s + dense_s, drafted_s + layers * naive_s + dense_s, layers * link_s, layers * misses)


def kept_experts(config: ModelConfig, plan: Plan, case: Case) -> float:
    """Experts of a layer that a pass finds on the accelerator: pinned, and with `retain` what free slots still hold."""
    pinned = _mean_pinned(plan) if plan.draft != "merged" else 0.0
    if not plan.retain:
        return min(pinned, config.num_experts)
    free = case.slots - _pinned(config, plan) - distinct(case.probabilities, case.choosing(plan.tokens_per_pass))
    return min(pinned + max(free, 0) / config.num_moe_layers, config.num_experts)


def _mean_pinned(plan: Plan) -> float:
    """Experts of a layer that the plan keeps (draft=self, cached_experts) or drafts with (draft=merged)."""
    value = plan.draft_experts or plan.cached_experts or 0
    return sum(value) / len(value) if isinstance(value, tuple) else value


def _pinned(config: ModelConfig, plan: Plan) -> float:
    return 0 if plan.draft == "merged" else _mean_pinned(plan) * config.num_moe_layers


def _stream(config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, shared_cores: bool) -> _Pass:
    """The engine's own list of tasks, simulated."""
    items, new = plan.micro_batches, plan.tokens_per_pass
    rows = case.rows / items
    work = _work(rows, new, case.context)
    tokens, experts = rows * new, config.num_experts
    stream_s = operators.seconds("stream", blocks=experts)
    if plan.link_bytes_per_s:
        stream_s = max(stream_s, experts * operators.expert_bytes / plan.link_bytes_per_s)
    used = distinct(case.probabilities, case.choosing(new) / items)
    seconds = {
        "embed": 0.0,
        "other1": operators.seconds("pre_attention", **work),
        "to_host": 0.0,  # part of the operators that were measured
        "attention": operators.seconds("attend_paged", **work),
        "to_accelerator": 0.0,
        "other2": operators.seconds("post_attention", **work),
        "experts": operators.seconds("experts", choices=tokens * config.experts_per_token, blocks=used),
        "stream": stream_s,
    }
    computed_s = sum(second for kind, second in seconds.items() if kind != "stream")
    seconds["other2"] += max(operators.seconds("streamed_layer", **work) - computed_s, 0.0)  # waiting for the workers
    pinned = spread(config.moe_layers, case.pinned_layers)
    tasks = _tasks(tuple(index is not None for index in config.moe_index), items, buffers=plan.layer_buffers, pinned=pinned)

    def of(task: Task) -> float:
        return seconds[task.kind]

    done = simulate(tasks, of, draft_s=drafted_s, shared_cores=shared_cores)
    naive_s = naive_seconds(tasks, of, draft_s=drafted_s, shared_cores=shared_cores)
    layers = config.num_moe_layers - len(pinned)
    return _Pass(done.iteration_s - drafted_s, naive_s, layers * stream_s, layers * experts)


_tasks = functools.cache(functools.partial(pass_tasks, chunks=1))


def refine(
    prediction: Prediction,
    config: ModelConfig,
    plan: Plan,
    operators: Operators,
    workload: Workload,
    *,
    shared_cores: bool,
    row_share: float = 1.0,
    run_share: float = 1.0,
) -> Prediction:
    """A prediction with the times of the measured operators in the place of rates and efficiencies.

    row_share, run_share: of Case.
    """
    case = Case(
        rows=prediction.rows,
        context=workload.context,
        probabilities=choice_probabilities(config.num_experts, config.experts_per_token, workload.skew),
        slots=prediction.account.num_slots,
        wanted_slots=prediction.account.wanted_slots,
        pinned_layers=prediction.account.pinned_layers,
        row_share=row_share,
        run_share=run_share,
    )
    times = step_times(config, plan, operators, case, shared_cores=shared_cores)
    tokens_per_s = prediction.rows * prediction.tokens_per_step / times.total_s
    return prediction._replace(
        iteration_s=times.total_s,
        draft_s=times.draft_s,
        tokens_per_s=tokens_per_s,
        interval=(tokens_per_s / (1 + operators.spread), tokens_per_s * (1 + operators.spread)),
        naive_s=times.naive_s,
        link_bytes_per_token=times.link_bytes / (prediction.rows * prediction.tokens_per_step),
        binding=UP if times.link_s > times.total_s / 2 else prediction.binding,
    )
