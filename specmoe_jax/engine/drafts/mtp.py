"""The target's own layers for further tokens as the draft, all of their experts on the accelerator or a few of them."""

import dataclasses

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.context import placed
from specmoe_jax.engine.drafts.hot_mtp import HotMtpDraft, host_blocks, without_experts
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead, check_head, random_head
from specmoe_jax.planner.drafts.search_starts import tree
from specmoe_jax.planner.memory.memory_account import MemoryAccount
from specmoe_jax.speculate.drafts.grown_tree import tree_shape
from specmoe_jax.speculate.drafts.mtp import MtpDraft
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
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
        on_host = host_blocks(head) is not None
        if on_host != (plan.draft_experts is not None):
            raise PlanError(
                f"draft_experts is {plan.draft_experts}, and the experts of the layer that was given are "
                f"{'in host memory' if on_host else 'on the accelerator'}; load it so: "
                f"checkpoints.load_mtp(model, experts_on_host={not on_host})"
            )
        return MtpDraft(_placed(head, plan.devices), tree_shape(plan))

    def for_job(self, draft: MtpDraft, runtime: Runtime, account: MemoryAccount) -> FeatureDraft:
        blocks, hot = host_blocks(draft.head), runtime.plan.draft_experts
        if blocks is None:
            return draft
        assert isinstance(hot, int)  # as `make` and the plan's checks want it
        own = draft._replace(head=without_experts(draft.head))
        return HotMtpDraft(draft=own, blocks=blocks, hot=hot, links=runtime.experts.store.links)

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


def _placed(head: MtpHead, devices: int) -> MtpHead:
    """On all devices, but for blocks in host memory."""
    held = [layer.experts if isinstance(layer.experts, tuple) else None for layer in head.chain]
    if not any(held):
        return placed(head, devices)
    first, *further = (
        dataclasses.replace(layer, experts=blocks)
        for layer, blocks in zip(placed(without_experts(head), devices).chain, held, strict=True)
    )
    return dataclasses.replace(first, further=tuple(further))


DRAFT = MtpExecutor()
