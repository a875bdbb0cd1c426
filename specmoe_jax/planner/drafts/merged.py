"""The merged draft: each layer's experts in groups, whose weighted means draft from slots of their own."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.drafts.gated import GatedDraftDescription
from specmoe_jax.support.errors import PlanError


class MergedDraftDescription(GatedDraftDescription):
    name = "merged"
    assumed_acceptance = 0.3

    def check(self, plan: Plan, config: ModelConfig) -> None:
        if isinstance(plan.draft_experts, tuple):
            raise PlanError(f"draft_experts is {plan.draft_experts}; draft=merged takes one number for all layers")
        super().check(plan, config)
        if plan.expert_dtype is not None:
            raise PlanError(
                f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without draft=merged; leave one out"
            )
        if config.experts.packing is not None:
            raise PlanError(
                f"draft=merged averages weights, and the experts are packed as {config.experts.packing}; take another draft"
            )

    def merged_slots(self, plan: Plan, config: ModelConfig) -> int:
        each = 0 if isinstance(plan.draft_experts, tuple) else plan.draft_experts or 0  # a tuple is refused
        return config.num_moe_layers * each


DRAFT = MergedDraftDescription()
