"""Fills the KV cache with the prompts, chunk by chunk, and leaves the first draft set resident.

What all prompts of a batch begin with (a system prompt, examples) is computed for one row, whose cache rows the others get.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine.flows.layer_passes import fetched, on_all
from specmoe_jax.engine.flows.protocol import Chunk, PooledFlowExecutor
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, PassRouting
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
    rows: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    on_positions: Callable[[int], object] = lambda positions: None,
    on_states: Callable | None = None,
    on_routing: Callable[[np.ndarray, PassRouting, np.ndarray], object] = lambda rows, routing, num_new: None,
) -> tuple[ExpertMemory, KVCache, Any]:
    """All tokens of each prompt but its last, which is the input of the first step.

    prompts: B token tuples, ragged; an empty one is a padding row. The draft set after the prefill is chosen
    by the routing of the whole prompt, not of its last chunk. draft_memory: of a FeatureDraft, which observes every chunk.
    rows: [B], of the batch whose draft memory it is, -1 for padding; None for its first B. starts: [B], positions of each prompt
    that are in the cache already, None for none. on_positions: called with the positions that were done since the last call.
    on_states: with (rows, following, h [B, T, M], num_new) of each chunk; h may be in host memory. on_routing: with (rows, routing,
    num_new) of each, where the runtime tells it.
    """
    every_row = np.arange(len(prompts), dtype=np.int32) if rows is None else rows
    starts = np.zeros(len(prompts), np.int32) if starts is None else starts

    def observe(one: Chunk, features, h, routing: PassRouting | None) -> None:
        nonlocal draft_memory
        num_new = one.num_new
        if on_states is not None:
            h = on_all(fetched(h))  # it may wait in host memory
        if one.stands_for > 1:  # caches of drafts and log-probabilities are each row's own
            row = int(num_new.argmax())
            num_new = np.where(counts, num_new[row], 0).astype(np.int32)
            features = None if features is None else jnp.broadcast_to(features[row], features.shape)
            routing = routing and _spread(routing, row)
            if on_states is not None:
                h = jnp.broadcast_to(h[row], h.shape)
        if on_states is not None:
            on_states(every_row, one.following, h, num_new)
        if routing is not None:
            on_routing(every_row, routing, num_new)
        if features is not None:
            draft_memory = runtime.feature_draft.observe(draft_memory, every_row, one.following, features, one.lengths, num_new)

    counts = _counts(prompts)
    shared = 0 if runtime.config.encoder or starts.any() else shared_positions(prompts, chunk)
    chunks = chunks_of(prompts, chunk, shared, starts)
    memory, kv, totals = flow.prompt_pass(runtime, memory, kv, chunks, observe, on_positions)
    usage_scores = runtime.policies.draft_set.update(memory.usage_scores, totals, totals)
    memory = memory._replace(usage_scores=usage_scores)
    return runtime.draft_executor.after_prefill(runtime, memory, totals), kv, draft_memory


def shared_positions(prompts: list[tuple[int, ...]], chunk: int) -> int:
    """Positions, whole chunks, in which all prompts of a batch are alike; 0 where there are not two. Empty ones are padding."""
    real = [prompt[:-1] for prompt in prompts if prompt]
    if len(real) < 2:
        return 0
    first, last = min(real), max(real)  # what these two share, all between them do
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return alike // chunk * chunk


def chunks_of(prompts: list[tuple[int, ...]], chunk: int, shared: int = 0, starts: np.ndarray | None = None) -> list[Chunk]:
    """The prompts but for their last tokens, `chunk` positions of every row at a time; of the first `shared` ones a single row.

    starts: [B], positions of each that are left out; None for none.
    """
    starts = np.zeros(len(prompts), np.int32) if starts is None else starts
    counts = _counts(prompts) - starts
    real = np.flatnonzero(counts)
    found = []
    for start in range(0, int(counts.max()), chunk):
        tokens, following = np.zeros((2, len(prompts), chunk), np.int32)
        num_new = np.clip(counts - start, 0, chunk).astype(np.int32)
        for row, prompt in enumerate(prompts):
            first = starts[row] + start
            tokens[row, : num_new[row]] = prompt[first : first + num_new[row]]
            following[row, : num_new[row]] = prompt[first + 1 : first + 1 + num_new[row]]
        one = Chunk(tokens, (starts + np.minimum(counts, start)).astype(np.int32), num_new, following)
        if start < shared:
            last = start + chunk == shared
            alone = np.where(np.arange(len(prompts)) == real[0], num_new, 0).astype(np.int32)
            one = one._replace(num_new=alone, stands_for=len(real), spreads_row=int(real[0]) if last else None)
        found.append(one)
    return found


def _spread(routing: PassRouting, row: int) -> PassRouting:
    """That of one row, for every row."""

    def all_rows(told: np.ndarray) -> np.ndarray:
        return np.broadcast_to(told[:, row, None], told.shape)

    return PassRouting(all_rows(routing.ids), None if routing.weights is None else all_rows(routing.weights))


def _counts(prompts: list[tuple[int, ...]]) -> np.ndarray:
    """[B] positions of each prompt that a prefill takes."""
    return np.array([max(len(prompt) - 1, 0) for prompt in prompts], np.int32)
