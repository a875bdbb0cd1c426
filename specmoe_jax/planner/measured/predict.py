"""Seconds of a step from the measured operators of this machine and model (operators.py). Pure.

The costs are those of the programs that run, so nothing is assumed about peaks; what is added up is what the engine does
(engine/flows/, engine/drafting.py): each flow times its own pass (flows/), the stream by simulating its list of tasks (SpecMoEOff
5.3, step 4).
"""

from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.offload.stream_schedule import UP
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.measured.case import Case
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.routing import choice_probabilities
from specmoe_jax.planner.workload import Workload


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


def step_times(config: ModelConfig, plan: Plan, operators: Operators, case: Case, *, accelerator_is_cpu: bool) -> StepTimes:
    """A step of a plan that drafts its whole length. accelerator_is_cpu: the accelerator's tasks and the CPU's run on the same
    cores.

    Deviations: kv_tier=host without streaming is taken as the accelerator's; a dense layer as the attention of one with experts.
    """
    drafted_s = plan.drafting.measured_seconds(plan, config, operators, case) if plan.draft_length else 0.0
    passed = plan.flow.measured_pass(config, plan, operators, case, drafted_s, accelerator_is_cpu=accelerator_is_cpu)
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
