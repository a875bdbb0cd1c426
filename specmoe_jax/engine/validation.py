"""What an engine is given beside its plan: whether it agrees with it."""

from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.executors import check_inputs
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.tracing import Span


def validate_inputs(model: Model, plan: Plan, inputs: DraftInputs, spans: list[Span] | None) -> None:
    """Raises PlanError for what the plan contradicts or does not use, and for a draft of another model."""
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
    check_inputs(model, plan, inputs)
