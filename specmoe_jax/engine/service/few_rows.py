"""A step of the rows that are active, where they are few: the others would take the time of rows that decode.

A service has rows for as many requests as may come. The caches stay as they are, also of rows whose request has ended: the next
turn of a conversation goes on from them.
"""

from collections.abc import Callable

import jax
import numpy as np

from specmoe_jax.engine.state import State, StepInfo
from specmoe_jax.types import KVCache, SomeRows

TIMES = 4  # from one size of a step to the next: each compiles programs of its own
OF_ROWS = ("requests", "generated", "statuses", "logprobs", "prompt_logprobs", "routing")  # fields of a state, tuples
Step = Callable[[State], tuple[State, StepInfo]]


def sizes(state: State) -> list[int]:
    """Rows of the steps that run fewer than all, ascending: 1, 4, 16, ..., half of the rows at most.

    None where more than the KV cache is kept of a row (by a draft, in a recurrent layer), where the cache is in host memory or
    divided over devices, and where drafts are trees.
    """
    plan, config = state.runtime.plan, state.runtime.config
    whole = not isinstance(state.kv, KVCache) or plan.cache_tier.on_host or plan.devices > 1 or config.recurrent_layers
    drafts = plan.drafting.given or plan.draft_tree_tokens or state.draft_memory is not None or state.row_stops is not None
    if whole or drafts:
        return []
    rows, found = len(state.requests), []
    while 2 * (size := TIMES ** len(found)) <= rows:
        found.append(size)
    return found


def step_active(state: State, step: Step) -> tuple[State, StepInfo]:
    """`step` of the smallest part of the rows that has all active ones. Consumes the state."""
    active = state.active
    size = next((size for size in sizes(state) if size >= active.sum()), None)
    if size is None:
        return step(state)
    others = np.flatnonzero(~active)[: size - active.sum()]
    rows = np.sort(np.concatenate([np.flatnonzero(active), others])).astype(np.int32)
    part, info = step(part_of(state, rows))
    return with_part(state, part, rows), _of_all(info, rows, len(active))


def part_of(state: State, rows: np.ndarray) -> State:
    """The state of some rows [b], over the caches of all."""
    some = {name: tuple(getattr(state, name)[row] for row in rows) for name in OF_ROWS}
    return state._replace(
        kv=state.kv._replace(k=tuple(SomeRows(keys, rows) for keys in state.kv.k)),
        lengths=state.lengths[rows],
        last_token=state.last_token[rows],
        rows=jax.tree.map(lambda array: array[rows], state.rows),
        **some,
    )


def with_part(state: State, part: State, rows: np.ndarray) -> State:
    """The state of all rows after a step of those of `part_of`."""
    fields = {name: list(getattr(state, name)) for name in OF_ROWS}
    for name, values in fields.items():
        for row, value in zip(rows, getattr(part, name), strict=True):
            values[row] = value
    return part._replace(
        kv=part.kv._replace(k=tuple(keys.cache for keys in part.kv.k)),
        lengths=_spread(part.lengths, rows, state.lengths),
        last_token=_spread(part.last_token, rows, state.last_token),
        rows=state.rows,
        **{name: tuple(values) for name, values in fields.items()},
    )


def _of_all(info: StepInfo, rows: np.ndarray, count: int) -> StepInfo:
    """What a step did, of all rows: nothing in the others."""

    def spread(array: np.ndarray) -> np.ndarray:
        return _spread(array, rows, np.zeros(count, array.dtype))

    routing = info.verify.routing  # [L, b, T, A]
    if routing is not None:
        every = np.full((len(routing), count, *routing.shape[2:]), -1, routing.dtype)
        every[:, rows] = routing
        routing = every
    return info._replace(
        accepted=spread(info.accepted),
        committed=spread(info.committed),
        active=spread(info.active),
        start=spread(info.start),
        verify=info.verify._replace(routing=routing),
    )


def _spread(array: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    whole = others.astype(array.dtype)
    whole[rows] = array
    return whole
