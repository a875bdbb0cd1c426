"""Drafts that are the target itself with fewer experts: its own gates choose among those that are resident."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import most
from specmoe_jax.config.presets import preset
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.drafts.checks import GATED_FIELDS
from specmoe_jax.planner.drafts.protocol import DraftCosts, DraftDescription
from specmoe_jax.planner.drafts.search_starts import LENGTHS, WORTH, Axis, SearchStart, expert_counts
from specmoe_jax.planner.layer_costs import resident_pass
from specmoe_jax.planner.measured.case import Case, kept_experts, layer_work
from specmoe_jax.planner.measured.operators import Operators, draft_work
from specmoe_jax.support.errors import PlanError

ASLEEP_S = 2e-3  # of a layer's wait for the link, after which cores are slow to wake


class GatedDraftDescription(DraftDescription):
    fields = GATED_FIELDS
    gated = True
    is_measured = True

    def check(self, plan: Plan, config: ModelConfig) -> None:
        super().check(plan, config)
        if plan.draft_experts is None or most(plan.draft_experts) > config.num_experts:
            raise PlanError(
                f"draft_experts is {plan.draft_experts}; draft={self.name} needs 1 to {config.num_experts}, the experts of a layer"
            )
        if plan.flow.all_resident:
            raise PlanError(
                f"draft={self.name} has no effect with expert_flow={plan.flow.name}, where every expert is at hand; use on_demand"
            )
        if plan.draft_stop is not None and plan.guard:
            raise PlanError(
                f"guard=True adapts one length for all rows and draft_stop={plan.draft_stop} one for each row; leave one out"
            )
        if not plan.flow.keeps_experts:
            raise PlanError(
                f"draft={self.name} needs experts that stay on the accelerator, expert_flow={plan.flow.name} keeps none; "
                "use on_demand"
            )

    def costs(self, plan: Plan, config: ModelConfig, load: Load, *, skew: float, hosts: int = 1, **_) -> DraftCosts:
        itemsize, length = DTYPE_BYTES[plan.dtype], plan.draft_length or 0
        chosen = routing.distinct(routing.choice_probabilities(config.num_experts, config.experts_per_token, skew), load.rows)
        one = Load(load.rows, 1, load.context + length / 2)
        token = resident_pass(
            config,
            one,
            min(chosen, mean_experts(plan)),
            itemsize,
            tier=plan.cache_tier,
            dense=dense_itemsize(plan.dtype, plan.dense_dtype),
            expert_bytes=costs.expert_bytes(config, plan),
            own=costs.own_load(one, plan),
        )
        gathered = costs.gather(config, one, plan, hosts) * config.num_moe_layers + costs.gather_logits(config, one, plan, hosts)
        return DraftCosts((*token, *gathered) * length, syncs=length if plan.prefetch == "draft" else 1)

    def operator(self, *, trees: bool) -> str:
        return "self_draft"

    def layers(self, config: ModelConfig) -> int:
        return config.num_layers

    def measured_seconds(self, plan: Plan, config: ModelConfig, operators: Operators, case: Case) -> float:
        length, rows = plan.draft_length or 0, case.rows
        work = draft_work(
            layers=config.num_moe_layers,
            length=length,
            rows=rows,
            context=case.context,
            blocks=min(mean_experts(plan), routing.distinct(case.probabilities, rows)),
            ahead=plan.prefetch == "draft",
            waited=_waited(config, plan, operators, case),
        )
        choice_s = operators.seconds("draft_head", rows=rows)
        attention = layer_work(rows, 1, case.context)
        dense_s = (config.num_layers - config.num_moe_layers) * operators.seconds("attention", **attention)
        return length * (choice_s + dense_s) + operators.seconds("self_draft", **work)

    def start(self, config: ModelConfig, flow: SearchStart, *, trees: bool = False) -> SearchStart | None:
        if not flow.plan.flow.keeps_experts or flow.plan.cached_experts:
            return None
        own = (Axis("draft_experts", expert_counts(config.num_experts)), Axis("draft_length", LENGTHS))
        prefetch = Axis("prefetch", ("none", "draft"), least_gain=WORTH)
        return SearchStart(preset("specmoe", config).replace(draft=self.name), (*own, *flow.axes, prefetch))


def mean_experts(plan: Plan) -> float:
    """Draft experts of a layer, on average."""
    value = plan.draft_experts or 0
    return sum(value) / len(value) if isinstance(value, tuple) else value


def _waited(config: ModelConfig, plan: Plan, operators: Operators, case: Case) -> float:
    """Whether the previous pass waited for the link so long that the cores went to sleep; between 0 and 1 if unclear."""
    if not plan.link_bytes_per_s or not plan.flow.keeps_experts:
        return 0.0
    misses = routing.missed(case.probabilities, case.choosing(plan.tokens_per_pass), kept_experts(config, plan, case))
    return min(misses * operators.expert_bytes / plan.link_bytes_per_s / ASLEEP_S, 1.0)
