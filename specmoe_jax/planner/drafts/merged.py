"""The merged draft: each layer's experts in groups, whose weighted means draft from slots of their own."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED
from specmoe_jax.models.packing import planned
from specmoe_jax.planner.drafts.gated import GatedDraftDescription
from specmoe_jax.support.errors import PlanError


class MergedDraftDescription(GatedDraftDescription):
    name = "merged"
    fields = GatedDraftDescription.fields | {"merge_every", "merge_experts"}
    several_devices = True
    assumed_acceptance = 0.3

    def check(self, plan: Plan, config: ModelConfig) -> None:
        if isinstance(plan.draft_experts, tuple):
            raise PlanError(f"draft_experts is {plan.draft_experts}; draft=merged takes one number for all layers")
        super().check(plan, config)
        if plan.expert_dtype not in (None, DECODED):
            raise PlanError(
                f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without draft=merged; leave one out"
            )
        if planned(config.experts, plan.expert_dtype).packing is not None:
            raise PlanError(
                f"draft=merged averages weights, and the checkpoint's experts are packed as {config.experts.packing};"
                f" take another draft, or expert_dtype={DECODED}"
            )

        if plan.merge_experts is not None and not plan.merge_every:
            raise PlanError(f"merge_experts={plan.merge_experts} has no effect without merge_every; give both or leave it out")
        if plan.merge_experts is not None and not (plan.draft_experts or 0) <= plan.merge_experts <= config.num_experts:
            wanted = f"{plan.draft_experts} (draft_experts) to {config.num_experts}, the experts of a layer"
            raise PlanError(f"merge_experts is {plan.merge_experts}; it must be {wanted}")
        if plan.merge_every and plan.expert_tier == "disk":
            raise PlanError("merge_every reads many experts and is built for experts in host memory; leave out expert_tier=disk")
        if plan.merge_every and plan.num_processes > 1:
            raise PlanError(
                f"merge_every reads many experts, and each of num_processes={plan.num_processes} has a part of them in memory; "
                "leave it out"
            )

    def merged_slots(self, plan: Plan, config: ModelConfig) -> int:
        each = 0 if isinstance(plan.draft_experts, tuple) else plan.draft_experts or 0  # a tuple is refused
        return config.num_moe_layers * each


DRAFT = MergedDraftDescription()
