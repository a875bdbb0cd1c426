"""Fills the KV cache with the prompts, chunk by chunk, and leaves the first draft set resident."""

from collections.abc import Callable
from typing import Any

import numpy as np

from specmoe_jax.engine.flows.protocol import Chunk, PooledFlowExecutor
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.types import KVCache


def prefill(
    flow: PooledFlowExecutor,
    runtime: Runtime,
    memory: ExpertMemory,
    kv: KVCache,
    prompts: list[tuple[int, ...]],
    chunk: int,
    draft_memory: Any = None,
    *,
    on_positions: Callable[[int], object] = lambda positions: None,
    on_states: Callable | None = None,
) -> tuple[ExpertMemory, KVCache, Any]:
    """All tokens of each prompt but its last, which is the input of the first step.

    prompts: B token tuples, ragged; an empty one is a padding row. The draft set after the prefill is chosen
    by the routing of the whole prompt, not of its last chunk. draft_memory: of a FeatureDraft, which observes every chunk.
    on_positions: called with the positions that were done since the last call. on_states: with (rows, following, h [B, T, M],
    num_new) of each chunk.
    """
    every_row = np.arange(len(prompts), dtype=np.int32)

    def observe(one: Chunk, features, h) -> None:
        nonlocal draft_memory
        if on_states is not None:
            on_states(every_row, one.following, h, one.num_new)
        if features is not None:
            draft_memory = runtime.feature_draft.observe(draft_memory, every_row, one.following, features, one.lengths, one.num_new)

    memory, kv, totals = flow.prompt_pass(runtime, memory, kv, chunks_of(prompts, chunk), observe, on_positions)
    usage_scores = runtime.policies.draft_set.update(memory.usage_scores, totals, totals)
    memory = memory._replace(usage_scores=usage_scores)
    return runtime.draft_executor.after_prefill(runtime, memory, totals), kv, draft_memory


def chunks_of(prompts: list[tuple[int, ...]], chunk: int) -> list[Chunk]:
    """The prompts but for their last tokens, `chunk` positions of every row at a time."""
    counts = np.array([max(len(prompt) - 1, 0) for prompt in prompts], np.int32)
    found = []
    for start in range(0, int(counts.max()), chunk):
        tokens, following = np.zeros((2, len(prompts), chunk), np.int32)
        num_new = np.clip(counts - start, 0, chunk).astype(np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : num_new[row]] = prompt[start : start + num_new[row]]
            following[row, : num_new[row]] = prompt[start + 1 : start + 1 + num_new[row]]
        found.append(Chunk(tokens, np.minimum(counts, start).astype(np.int32), num_new, following))
    return found
