"""Experts are computed where they lie in host memory, because the accelerator is the CPU: no slot, no copy."""

import threading
from collections.abc import Sequence

import jax
import numpy as np

from specmoe_jax.engine.flows.resident import ResidentFlowExecutor
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.offload.residency import empty
from specmoe_jax.offload.tiers import block_addresses
from specmoe_jax.support.host_memory import anonymous_bytes, available_bytes, enter_pages


class HostComputeFlowExecutor(ResidentFlowExecutor):
    """The resident flow, whose pool is a table of addresses: `models.experts.expert_ffn` takes both."""

    def first_memory(self, runtime: Runtime) -> ExpertMemory:
        shape, config = (runtime.config.num_expert_layers, runtime.config.num_experts), runtime.config
        tier = runtime.experts.store.tier
        blocks = list(tier.blocks([(layer, expert) for layer in range(shape[0]) for expert in range(shape[1])]))
        size = sum(block.nbytes for block in blocks)
        are_pages, fit = _are_pages_of_files(size), _fit(size)
        if are_pages and fit:
            # Beside the first steps: a checkpoint that was just mapped is there at once, and no step waits for all of it.
            threading.Thread(target=_enter, args=(blocks,), name="specmoe-pages", daemon=True).start()
        # Of blocks that stay, asking for their pages at every call would be for nothing.
        addresses = block_addresses(blocks, may_be_away=are_pages and not fit)
        return ExpertMemory(
            slots=runtime.experts.slots,
            pool=jax.device_put(addresses, runtime.context.device),
            residency=empty(*shape, 0),
            usage_scores=np.zeros((config.num_moe_layers, config.num_experts)),
            prefetched=np.zeros(shape, bool),
        )


def _enter(blocks: Sequence[jax.Array]) -> None:
    """Holds the blocks until it is done, so the pages are theirs."""
    enter_pages((block.unsafe_buffer_pointer(), block.nbytes) for block in blocks)


def _are_pages_of_files(size: int) -> bool:
    """Blocks of `size` bytes together, since what this process holds for itself is less."""
    anonymous = anonymous_bytes()
    return anonymous is not None and anonymous < size


def _fit(size: int) -> bool:
    available = available_bytes()
    return available is None or size <= available


FLOW = HostComputeFlowExecutor()
