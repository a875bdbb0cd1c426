"""Checks that the inputs of an engine agree with its plan."""

import numpy as np

from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.executors import check_inputs
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing import planned
from specmoe_jax.models.packing.dense import packed_as
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.tracing import Span

ROUTING_DETAILS = ("ids", "weights")


def validate_inputs(
    model: Model,
    plan: Plan,
    inputs: DraftInputs,
    *,
    draft_set: DraftSetPolicy | None,
    spans: list[Span] | None,
    routing: str | None,
    popularity: np.ndarray | None,
) -> None:
    """Raises PlanError for what the plan contradicts or does not use, and for a draft of another model."""
    if spans is not None and not plan.flow.workers:
        raise PlanError(f"spans have no effect with expert_flow={plan.flow.name}, which has no lanes; leave them out")
    if routing not in (None, *ROUTING_DETAILS):
        raise PlanError(f"routing is {routing!r}; it must be one of {', '.join(ROUTING_DETAILS)}, or None")
    if plan.dtype != model.dtype:
        raise PlanError(f"the plan says dtype={plan.dtype}, the model was loaded as {model.dtype}; make them agree")
    if planned(model.config.experts, plan.expert_dtype).packing != model.config.experts.packing:
        raise PlanError(
            f"the plan says expert_dtype={plan.expert_dtype}, the model's experts are packed as {model.config.experts.packing};"
            " make them agree (models.quantised.quantise)"
        )
    if packed_as(model.weights) != plan.dense_dtype:
        raise PlanError(
            f"the plan says dense_dtype={plan.dense_dtype}, the model's dense matrices are packed as {packed_as(model.weights)};"
            " make them agree (models.quantised.quantise)"
        )
    tier = "disk" if isinstance(model.experts, DiskExperts) else "host"
    if plan.expert_tier != tier:
        raise PlanError(f"the plan says expert_tier={plan.expert_tier}, the model was loaded with {tier}; make them agree")
    check_inputs(model, plan, inputs)
    check_popularity(model.config, plan, popularity)
    if draft_set is not None:
        _check_draft_set(plan, draft_set)


def check_popularity(config: ModelConfig, plan: Plan, popularity: np.ndarray | None) -> None:
    """Raises PlanError."""
    if popularity is None:
        if plan.placing.by_popularity:
            raise PlanError(f"placement={plan.placement} needs to know how often experts are chosen; give popularity")
        return
    if not plan.placing.by_popularity:
        raise PlanError(f"popularity has no effect with placement={plan.placement or 'modulo'}; leave it out")
    shape = (config.num_moe_layers, config.num_experts)
    if popularity.shape != shape or not (np.isfinite(popularity) & (popularity >= 0)).all():
        raise PlanError(f"popularity is {popularity.dtype} {list(popularity.shape)}; give counts of 0 or more, {list(shape)}")


def _check_draft_set(plan: Plan, policy: DraftSetPolicy) -> None:
    if not isinstance(policy, DraftSetPolicy):
        raise PlanError(f"draft_set is a {type(policy).__name__}; give Engine a speculate.DraftSetPolicy, or name one in the plan")
    if plan.draft_set is not None:
        raise PlanError(f"the plan says draft_set={plan.draft_set} and Engine is given {policy.name!r}; leave one out")
    if "draft_set" not in plan.drafting.fields:
        raise PlanError(f"the draft_set given to Engine has no effect with draft={plan.drafting.name}; leave it out")
