"""The target's own layers for further tokens as the draft."""

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead, check_head, random_head
from specmoe_jax.planner.drafts.search_starts import tree
from specmoe_jax.speculate.drafts.grown_tree import tree_shape
from specmoe_jax.speculate.drafts.mtp import MtpDraft
from specmoe_jax.support.errors import PlanError


class MtpExecutor(DraftExecutor):
    def check(self, model: Model, inputs: DraftInputs) -> None:
        check_head(model, _head(inputs))

    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> MtpDraft:
        head = _head(inputs)
        held = head.config.experts and head.config.experts.packing
        if held != plan.draft_expert_dtype:
            raise PlanError(
                f"draft_expert_dtype is {plan.draft_expert_dtype}, and the experts of the layer that was given are packed as "
                f"{held}; load it so: checkpoints.load_mtp(model, expert_dtype=plan.draft_expert_dtype)"
            )
        return MtpDraft(head, tree_shape(plan))

    def random_inputs(self, model: Model) -> dict:
        return {"mtp_head": random_head(model)}

    def calibration_runs(self, inputs: DraftInputs, length: int) -> dict[str, dict]:
        if inputs.mtp_head is None:
            return {}
        chain = {"mtp": {"draft": "mtp", "draft_length": length}}
        return chain if inputs.mtp_head.further else chain | {"mtp_tree": {"draft": "mtp", **tree(length)}}


def _head(inputs: DraftInputs) -> MtpHead:
    """That it was given has been checked."""
    assert inputs.mtp_head is not None
    return inputs.mtp_head


DRAFT = MtpExecutor()
