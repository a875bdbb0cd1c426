"""An EAGLE head as the draft, its cache whole or split as the account of the job has room for it."""

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.context import placed
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.drafts.split_draft import SplitDraft
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.models.eagle.network import EagleHead, check_head, random_head
from specmoe_jax.models.model import Model
from specmoe_jax.planner.drafts.eagle import usual_head
from specmoe_jax.planner.drafts.search_starts import tree
from specmoe_jax.planner.memory.memory_account import DraftMemory, MemoryAccount
from specmoe_jax.speculate.drafts.eagle import EagleDraft
from specmoe_jax.speculate.drafts.grown_tree import tree_shape
from specmoe_jax.speculate.drafts.protocol import FeatureDraft


class EagleExecutor(DraftExecutor):
    def check(self, model: Model, inputs: DraftInputs) -> None:
        check_head(model, _head(inputs))

    def memory(self, model: Model, plan: Plan, inputs: DraftInputs) -> DraftMemory:
        return plan.drafting.memory(plan, model.config, head=_head(inputs).config)

    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> EagleDraft:
        return EagleDraft(placed(_head(inputs), plan.devices), tree_shape(plan))

    def for_job(self, draft: EagleDraft, runtime: Runtime, account: MemoryAccount) -> FeatureDraft:
        if not account.draft_pages:
            return draft
        return SplitDraft(
            head=draft.head,
            tree=draft.tree,
            context=runtime.context,
            lookahead=runtime.plan.lookahead,
            pages=account.draft_pages,
            host_pages=account.kv_pages,
        )

    def random_inputs(self, model: Model) -> dict:
        return {"draft_head": random_head(usual_head(model.config), model)}

    def calibration_runs(self, inputs: DraftInputs, length: int) -> dict[str, dict]:
        if inputs.draft_head is None:
            return {}
        return {"eagle": {"draft": "eagle", "draft_length": length}, "eagle_tree": {"draft": "eagle", **tree(length)}}


def _head(inputs: DraftInputs) -> EagleHead:
    """That it was given has been checked."""
    assert inputs.draft_head is not None
    return inputs.draft_head


DRAFT = EagleExecutor()
