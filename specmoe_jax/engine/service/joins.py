"""Which waiting request takes which row, and how much of its prompt the cache of some row already holds. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.engine.state import Request, State

JOIN_ROWS = 8  # requests whose prompts are read together between two steps: those that run wait for them
LEAST_CHUNK = 16  # positions that a pass over prompts takes at least
LEAST_SHARED = 8  # positions in common that are worth a copy


class Join(NamedTuple):
    """row: gets the request. source: the row whose first `shared` cached positions are those of the prompt."""

    request: Request
    row: int
    source: int
    shared: int


def plan_joins(state: State, waiting: Sequence[Request], *, reuse: bool) -> tuple[Join, ...]:
    """The first of the waiting requests, as many as have free rows and are read together.

    reuse: whether a prompt may go on from what a cache holds. A free row that holds its beginning is taken before others (the next
    turn of a conversation), else an empty one or that of the oldest request.
    """
    free = [int(row) for row in np.flatnonzero(~(state.active | state.joining))]
    held, joins = {row: _held(state, row) for row in range(len(state.requests))} if reuse else {}, []
    for request in waiting[:JOIN_ROWS]:
        if not free:
            break
        source, shared = _longest(request, held)
        row = source if shared and source in free else min(free, key=lambda row: _age(state, row))
        joins.append(Join(request, row, source if shared else row, shared))
        free.remove(row)
        held.pop(row, None)  # what it holds is overwritten with this group
    return tuple(joins)


def prefill_width(count: int) -> int:
    """Rows of the pass over so many prompts, of few different widths, since each compiles programs of its own."""
    return 1 << (count - 1).bit_length()


def prefill_chunk(positions: int, most: int) -> int:
    """Positions of a chunk of the longest of some prompts, at most `most`: 16, 64, 256, ..."""
    chunk = LEAST_CHUNK
    while chunk < positions:
        chunk *= 4
    return min(chunk, most)


def _held(state: State, row: int) -> tuple[int, ...]:
    """The tokens whose keys and values a row's cache holds; of one whose logits broke, none."""
    request = state.requests[row]
    if request is None or state.statuses[row].reason == "error":
        return ()
    return (request.token_ids + state.generated[row])[: int(state.lengths[row])]


def _longest(request: Request, held: dict[int, tuple[int, ...]]) -> tuple[int, int]:
    """The row that holds most of the prompt's beginning, and how much; 0 where that is too little, or the whole is to be read."""
    if request.params.prompt_logprobs is not None:
        return 0, 0
    prompt = request.token_ids[:-1]
    found = max(((_common(prompt, tokens), -row) for row, tokens in held.items()), default=(0, 0))
    return (-found[1], found[0]) if found[0] >= LEAST_SHARED else (0, 0)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if a[:LEAST_SHARED] != b[:LEAST_SHARED]:  # most are no relatives, and all are compared at every join
        return 0
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _age(state: State, row: int) -> int:
    request = state.requests[row]
    return -1 if request is None else request.id
