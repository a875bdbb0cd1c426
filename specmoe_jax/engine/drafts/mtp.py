"""The target's own layer for further tokens as the draft."""

from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead, check_head, random_head
from specmoe_jax.speculate.drafts.mtp import MtpDraft


class MtpExecutor(DraftExecutor):
    def check(self, model: Model, inputs: DraftInputs) -> None:
        check_head(model, _head(inputs))

    def make(self, model: Model, plan, inputs: DraftInputs) -> MtpDraft:
        return MtpDraft(_head(inputs))

    def random_inputs(self, model: Model) -> dict:
        return {"mtp_head": random_head(model)}

    def calibration_runs(self, inputs: DraftInputs, length: int) -> dict[str, dict]:
        return {} if inputs.mtp_head is None else {"mtp": {"draft": "mtp", "draft_length": length}}


def _head(inputs: DraftInputs) -> MtpHead:
    """That it was given has been checked."""
    assert inputs.mtp_head is not None
    return inputs.mtp_head


DRAFT = MtpExecutor()
