"""What an engine is given beside its plan: whether it agrees with it, and what a draft among it takes."""

from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import fields_of_a_plan
from specmoe_jax.engine.drafts.draft_model import resident_plan
from specmoe_jax.models.eagle.network import EagleHead, check_head, head_bytes, position_bytes
from specmoe_jax.models.model import Model
from specmoe_jax.planner.drafts import model_memory
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.speculate.drafts.protocol import Draft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.tracing import Span


def validate_inputs(
    model: Model,
    plan: Plan,
    *,
    draft: Draft | None,
    draft_model: Model | None,
    draft_head: EagleHead | None,
    draft_set: DraftSetPolicy | None,
    spans: list[Span] | None,
) -> None:
    """Raises PlanError for what the plan contradicts or does not use, and for a head of another model."""
    if (plan.draft == "custom") != (draft is not None):
        raise PlanError(f"draft={plan.draft} and a draft object {'' if draft else 'not '}given; custom needs one")
    if draft is not None and not callable(getattr(draft, "propose", None)):
        raise PlanError(f"the draft object is a {type(draft).__name__} without propose(view); docs/extending.md has an example")
    if spans is not None and plan.expert_flow != "stream":
        raise PlanError(f"spans have no effect with expert_flow={plan.expert_flow}, which has no lanes; leave them out")
    if plan.dtype != model.dtype:
        raise PlanError(f"the plan says dtype={plan.dtype}, the model was loaded as {model.dtype}; make them agree")
    if plan.expert_dtype != model.config.experts.packing:
        raise PlanError(
            f"the plan says expert_dtype={plan.expert_dtype}, the model's experts are packed as {model.config.experts.packing};"
            " make them agree (models.quantised.quantise)"
        )
    tier = "disk" if isinstance(model.experts, DiskExperts) else "host"
    if plan.expert_tier != tier:
        raise PlanError(f"the plan says expert_tier={plan.expert_tier}, the model was loaded with {tier}; make them agree")
    if (plan.draft == "model") != (draft_model is not None):
        raise PlanError(
            f"draft={plan.draft} and {'a' if draft_model else 'no'} draft model given; draft=model and draft_model go together"
        )
    if (plan.draft == "eagle") != (draft_head is not None):
        raise PlanError(
            f"draft={plan.draft} and {'a' if draft_head else 'no'} draft head given; draft=eagle and draft_head go together"
        )
    if draft_head is not None:
        check_head(model, draft_head)
    if draft_set is not None:
        _check_draft_set(plan, draft_set)


def _check_draft_set(plan: Plan, policy: DraftSetPolicy) -> None:
    if not isinstance(policy, DraftSetPolicy):
        raise PlanError(f"draft_set is a {type(policy).__name__}; give Engine a speculate.DraftSetPolicy, or name one in the plan")
    if plan.draft_set is not None:
        raise PlanError(f"the plan says draft_set={plan.draft_set} and Engine is given {policy.name!r}; leave one out")
    for need in fields_of_a_plan()["draft_set"].info.needs:
        if not need.condition(plan):
            raise PlanError(f"the draft_set given to Engine has no effect {need.without.format(plan=plan)}; leave it out")


def draft_needs(plan: Plan, model: Model | None, head: EagleHead | None) -> DraftMemory:
    """The memory of a draft of its own; nothing without one."""
    if head is not None:
        fixed, one = (head_bytes(head, batch_rows=rows, positions=0) for rows in (0, 1))
        return DraftMemory(fixed=fixed, row=one - fixed, position=position_bytes(head))
    return DraftMemory() if model is None else model_memory(model.config, resident_plan(model, plan))
