"""Experts are computed where they lie in host memory, because the accelerator is the CPU: no slot, no copy."""

import jax
import numpy as np

from specmoe_jax.engine.flows.resident import ResidentFlowExecutor
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.offload.residency import empty
from specmoe_jax.offload.tiers import block_addresses
from specmoe_jax.support.host_memory import anonymous_bytes, available_bytes


class HostComputeFlowExecutor(ResidentFlowExecutor):
    """The resident flow, whose pool is a table of addresses: `models.experts.expert_ffn` takes both."""

    def first_memory(self, runtime: Runtime) -> ExpertMemory:
        shape, config = (runtime.config.num_expert_layers, runtime.config.num_experts), runtime.config
        tier = runtime.experts.store.tier
        blocks = list(tier.blocks([(layer, expert) for layer in range(shape[0]) for expert in range(shape[1])]))
        may_be_away = _are_pages_that_do_not_fit(sum(block.nbytes for block in blocks))
        return ExpertMemory(
            slots=runtime.experts.slots,
            pool=jax.device_put(block_addresses(blocks, may_be_away=may_be_away), runtime.context.device),
            residency=empty(*shape, 0),
            usage_scores=np.zeros((config.num_moe_layers, config.num_experts)),
            prefetched=np.zeros(shape, bool),
        )


def _are_pages_that_do_not_fit(size: int) -> bool:
    """Of blocks that stay, asking for their pages at every call would be for nothing. size: of all of them."""
    available, anonymous = available_bytes(), anonymous_bytes()
    return available is not None and anonymous is not None and anonymous < size and available < size


FLOW = HostComputeFlowExecutor()
