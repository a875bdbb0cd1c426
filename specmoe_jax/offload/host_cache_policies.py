"""Which experts leave a host cache first: the policies of the disk tier, which the planner's replay shares. Pure.

A policy sees what is known of the candidates and answers with sort keys; a new one is a function here and a line in
config/registry.py.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

FADE = 0.95  # of what earlier visits of a layer count for, at each new one: texts change their experts within tens of passes


class Usage(NamedTuple):
    """What is known of each candidate. last: when it was last asked for. count: how often it was. now: uses of all so far.

    wait: passes until it is asked for next, as `expected_wait` has it; None where nobody kept account of visits.
    following: when it is asked for next, which only a replay of a recorded trace knows; else None. fading: choices, counting less
    from pass to pass; drafted: how often the draft's gates chose it for what is left of this pass; None where nobody kept account.
    """

    last: np.ndarray
    count: np.ndarray
    now: int = 0
    wait: np.ndarray | None = None
    following: np.ndarray | None = None
    fading: np.ndarray | None = None
    drafted: np.ndarray | None = None


class Visits(NamedTuple):
    """How often the recent visits of its layer asked for each expert: uses [L, E] of visits [L].

    layer: the one visited last, -1 before the first.
    """

    uses: np.ndarray
    visits: np.ndarray
    layer: int = -1


def visited(before: Visits, layer: int, experts: Sequence[int] | np.ndarray) -> Visits:
    """After a visit of a layer, or after one more part of the visit that it is at."""
    uses, visits = before.uses.copy(), before.visits.copy()
    if layer != before.layer or len(visits) == 1:
        uses[layer] *= FADE
        visits[layer] = FADE * visits[layer] + 1
    uses[layer, experts] += 1
    return Visits(uses, visits, layer)


def expected_wait(seen: Visits) -> np.ndarray:
    """[L, E], passes until an expert is asked for next: its layer's turn, and then as rarely as its recent visits say."""
    layers = len(seen.visits)
    turn = ((np.arange(layers) - seen.layer - 1) % layers + 1) / layers
    return turn[:, None] + (seen.visits[:, None] + 2) / (seen.uses + 1) - 1


class HostCachePolicy(Protocol):
    """Sort keys of the candidates, the most important key last (np.lexsort); the smallest are evicted first."""

    def __call__(self, usage: Usage) -> tuple[np.ndarray, ...]: ...


def least_recently_used(usage: Usage) -> tuple[np.ndarray, ...]:
    """LRU."""
    return (usage.last,)


def most_recently_used(usage: Usage) -> tuple[np.ndarray, ...]:
    """MRU: a scan over all experts needs what it has just used last of all."""
    return (-usage.last,)


def least_frequently_used(usage: Usage) -> tuple[np.ndarray, ...]:
    """LFU; of those used equally often the least recently used first."""
    return (usage.last, usage.count)


def least_frequently_recently_used(usage: Usage) -> tuple[np.ndarray, ...]:
    """LFRU: frequency / (age + 1); of equals the least recently used first."""
    return (usage.last, usage.count / (usage.now - usage.last + 1))


def longest_expected_wait(usage: Usage) -> tuple[np.ndarray, ...]:
    """Belady's rule by what can be known: layers are visited in turn, and each expert as often as lately."""
    assert usage.wait is not None
    return (usage.last, -usage.wait)


def eviction_order(policy: HostCachePolicy, usage: Usage, candidates: np.ndarray) -> list[tuple[int, int]]:
    """The candidates [L, E] bool as (layer, expert), the first to go first; ties to the smaller layer and id. usage: [L, E]."""
    layers, experts = np.nonzero(candidates)
    known = {name: values[layers, experts] for name, values in usage._asdict().items() if isinstance(values, np.ndarray)}
    order = np.lexsort(policy(usage._replace(**known)))
    return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
