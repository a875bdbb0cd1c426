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
from specmoe_jax.planner.measured.case import Case, kept_experts, layer_work, mean_pinned
from specmoe_jax.planner.measured.operators import Operators, draft_work
from specmoe_jax.planner.routing import choice_probabilities, distinct, missed
from specmoe_jax.planner.workload import Workload

ASLEEP_S = 2e-3  # of a layer's wait for the link, after which cores are slow to wake


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
    drafted_s = draft_seconds(config, plan, operators, case)
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


def draft_seconds(config: ModelConfig, plan: Plan, operators: Operators, case: Case) -> float:
    """`draft_length` tokens of every row, one after the other; of a tree its levels."""
    length, rows = plan.draft_length or 0, case.rows
    if plan.draft in ("none", "custom") or not length:
        return 0.0
    if plan.draft == "ngram":
        return operators.seconds("lookup", rows=rows, read=rows * case.context)
    width = rows * (plan.draft_tree_top_k or 1)
    if plan.draft_tree_top_k:
        return operators.seconds("eagle_tree_draft", **draft_work(layers=1, length=length, rows=width, context=case.context))
    choice_s = operators.seconds("draft_head", rows=rows)
    if plan.draft == "eagle":
        work = draft_work(layers=1, length=length, rows=rows, context=case.context)
        return length * choice_s + operators.seconds("eagle_draft", **work)
    work = draft_work(
        layers=config.num_moe_layers,
        length=length,
        rows=rows,
        context=case.context,
        blocks=min(mean_pinned(plan), distinct(case.probabilities, rows)),
        ahead=plan.prefetch == "draft",
        waited=_waited(config, plan, operators, case),
    )
    dense_s = (config.num_layers - config.num_moe_layers) * operators.seconds("attention", **layer_work(rows, 1, case.context))
    return length * (choice_s + dense_s) + operators.seconds("self_draft", **work)


def _waited(config: ModelConfig, plan: Plan, operators: Operators, case: Case) -> float:
    """Whether the pass before waited for the link so long that the cores went to sleep; between 0 and 1 where it is not clear."""
    if not plan.link_bytes_per_s or not plan.flow.fetches_misses:
        return 0.0
    misses = missed(case.probabilities, case.choosing(plan.tokens_per_pass), kept_experts(config, plan, case))
    return min(misses * operators.expert_bytes / plan.link_bytes_per_s / ASLEEP_S, 1.0)


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
