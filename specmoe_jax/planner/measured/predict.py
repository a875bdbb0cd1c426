"""Seconds of a step from the measured operators of this machine and model (operators.py). Pure.

The costs are those of the programs that run, so nothing is assumed about peaks; what is added up is what the engine does
(engine/flows/layer_passes.py, engine/drafting.py), and for expert_flow=stream its own list of tasks is simulated (SpecMoEOff
5.3, step 4).
"""

import functools
import math
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.offload.stream_schedule import UP, Task, pass_tasks, spread
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.measured.case import Case, kept_experts, pinned_slots
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.routing import choice_probabilities, distinct, missed
from specmoe_jax.planner.simulate import naive_seconds, simulate
from specmoe_jax.planner.workload import Workload

GATES_RIGHT = 0.8  # of a pass's misses, the share that the draft's gates foresee (prefetch=draft)


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


def step_times(config: ModelConfig, plan: Plan, operators: Operators, case: Case, *, accelerator_is_cpu: bool) -> StepTimes:
    """A step of a plan that drafts its whole length. accelerator_is_cpu: the accelerator's tasks and the CPU's run on the same
    cores.

    Deviations: kv_tier=host without streaming is taken as the accelerator's; a dense layer as the attention of one with experts.
    """
    drafted_s = plan.drafting.measured_seconds(plan, config, operators, case) if plan.draft_length else 0.0
    flow = {
        "resident": _resident,
        "on_demand": _on_demand,
        "stream": functools.partial(_stream, accelerator_is_cpu=accelerator_is_cpu),
    }
    passed = flow[plan.expert_flow](config, plan, operators, case, drafted_s)
    after_s = operators.seconds("head", tokens=case.rows * plan.tokens_per_pass)
    if plan.draft_tree_top_k:
        after_s += operators.seconds("tree_path", tokens=case.rows * plan.tokens_per_pass)
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


def _work(rows: float, new: float, context: float) -> dict[str, float]:
    return {"rows": rows, "tokens": rows * new, "read": rows * context, "scores": rows * new * context}


def _resident(config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float) -> _Pass:
    new = plan.tokens_per_pass
    blocks = distinct(case.probabilities, case.choosing(new))
    work = _work(case.rows, new, case.context)
    seconds = config.num_moe_layers * operators.seconds("resident_layer", blocks=blocks, **work)
    seconds += (config.num_layers - config.num_moe_layers) * operators.seconds("attention", **work)
    return _Pass(verify_s=seconds, naive_s=drafted_s + seconds, link_s=0.0, misses=0.0)


def _on_demand(config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float) -> _Pass:
    """Layer by layer: attention, then the misses over the link, then the experts."""
    new, layers = plan.tokens_per_pass, config.num_moe_layers
    work = _work(case.rows, new, case.context)
    tokens = case.choosing(new)
    used, misses = distinct(case.probabilities, tokens), missed(case.probabilities, tokens, kept_experts(config, plan, case))
    expert_s = operators.expert_bytes / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
    ahead = 0.0  # of a layer's misses, those that arrive while drafting, in slots that no dispatch needs
    if plan.prefetch == "draft" and expert_s:
        spare = max(case.slots - case.wanted_slots, 0)
        ahead = min(GATES_RIGHT * misses, drafted_s / expert_s / layers, spare / layers)
    copied = misses - ahead
    waves = max(1, math.ceil(used / max(case.slots - pinned_slots(config, plan), 1))) if case.slots < case.wanted_slots else 0
    without_s = operators.seconds("on_demand_layer", blocks=used, misses=0, waves=waves, **work)
    with_s = operators.seconds("on_demand_layer", blocks=used, misses=copied, waves=waves, **work)
    link_s = misses * expert_s if expert_s else with_s - without_s
    layer_s = max(with_s, without_s + copied * expert_s)
    naive_s = max(without_s, link_s)
    dense_s = (config.num_layers - layers) * operators.seconds("attention", **work)
    return _Pass(layers * layer_s + dense_s, drafted_s + layers * naive_s + dense_s, layers * link_s, layers * misses)


def _stream(
    config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, accelerator_is_cpu: bool
) -> _Pass:
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
        "pre_attention": operators.seconds("pre_attention", **work),
        "to_host": 0.0,  # part of the operators that were measured
        "attention": operators.seconds("attend_paged", **work),
        "to_accelerator": 0.0,
        "post_attention": operators.seconds("post_attention", **work),
        "experts": operators.seconds("experts", choices=tokens * config.experts_per_token, blocks=used),
        "stream": stream_s,
    }
    computed_s = sum(second for kind, second in seconds.items() if kind != "stream")
    without = 1.0  # of a pinned layer's time
    if accelerator_is_cpu:  # nothing overlaps: the micro-batches together take what they were seen to take, with the layer's copies
        layer_s = operators.seconds("streamed_layer", items=items, **{name: items * amount for name, amount in work.items()})
        seconds |= {kind: second * layer_s / items / computed_s for kind, second in seconds.items() if kind != "stream"}
        without = max(1 - operators.seconds("stream", blocks=experts) / layer_s, 0.5)
    else:
        layer_s = operators.seconds("streamed_layer", items=1, **work)
        seconds["post_attention"] += max(layer_s - computed_s, 0.0)  # waiting for the workers
    pinned = spread(config.moe_layers, case.pinned_layers)
    has_experts = tuple(index is not None for index in config.moe_index)
    tasks = pass_tasks(has_experts, items, 1, buffers=plan.layer_buffers, pinned=pinned)

    def of(task: Task) -> float:
        return seconds[task.kind] * (without if task.layer in pinned else 1.0)

    done = simulate(tasks, of, draft_s=drafted_s, accelerator_is_cpu=accelerator_is_cpu)
    naive_s = naive_seconds(tasks, of, draft_s=drafted_s, accelerator_is_cpu=accelerator_is_cpu)
    layers = config.num_moe_layers - len(pinned)
    return _Pass(done.iteration_s - drafted_s, naive_s, layers * stream_s, layers * experts)


def refine(
    prediction: Prediction,
    config: ModelConfig,
    plan: Plan,
    operators: Operators,
    workload: Workload,
    *,
    accelerator_is_cpu: bool,
    row_share: float = 1.0,
    run_share: float = 1.0,
) -> Prediction:
    """A prediction with the times of the measured operators in the place of rates and efficiencies.

    row_share, run_share: of Case.
    """
    case = Case(
        rows=prediction.rows,
        context=workload.context,
        probabilities=choice_probabilities(config.num_experts, config.experts_per_token, workload.skew_of(config)),
        slots=prediction.account.num_slots,
        wanted_slots=prediction.account.wanted_slots,
        pinned_layers=prediction.account.pinned_layers,
        row_share=row_share,
        run_share=run_share,
    )
    times = step_times(config, plan, operators, case, accelerator_is_cpu=accelerator_is_cpu)
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
