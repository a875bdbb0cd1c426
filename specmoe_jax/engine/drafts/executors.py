"""The executor of a plan's draft, and whether an engine was given what the draft needs."""

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import PlanError

# Of each argument of Engine: what it is called in a message, and how to give it.
_INPUTS = {
    "draft": ("draft object", "draft=custom and an object with propose(view) go together"),
    "draft_model": ("draft model", "draft=model and draft_model go together"),
    "mtp_head": ("layer for further tokens", "draft=mtp and mtp_head=checkpoints.load_mtp(model) go together"),
    "draft_head": ("draft head", "draft=eagle and draft_head go together"),
}


def executor_of(plan: Plan) -> DraftExecutor:
    """Raises PlanError for an unknown draft."""
    return DRAFTS.executor(plan.draft)


def check_inputs(model: Model, plan: Plan, inputs: DraftInputs) -> None:
    """Raises PlanError for an input that the plan's draft lacks or does not use, and for one that does not go with the model."""
    for name, value in inputs._asdict().items():
        if (plan.drafting.given == name) != (value is not None):
            what, advice = _INPUTS[name]
            raise PlanError(f"draft={plan.draft} and a {what} {'not ' if value is None else ''}given; {advice}")
    executor_of(plan).check(model, inputs)
