"""Which experts leave a host cache first: the policies of the disk tier, which the planner's replay shares. Pure.

A policy sees what is known of the candidates and answers with sort keys; a new one is a function here and a line in
config/registry.py.
"""

from typing import NamedTuple, Protocol

import numpy as np


class Usage(NamedTuple):
    """What is known of each candidate. last: when it was last asked for. count: how often it was.

    following: when it is asked for next, which only a replay of a recorded trace knows; else None.
    """

    last: np.ndarray
    count: np.ndarray
    following: np.ndarray | None = None


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


def eviction_order(policy: HostCachePolicy, usage: Usage, candidates: np.ndarray) -> list[tuple[int, int]]:
    """The candidates [L, E] bool as (layer, expert), the first to go first; ties to the smaller layer and id. usage: [L, E]."""
    layers, experts = np.nonzero(candidates)
    following = None if usage.following is None else usage.following[layers, experts]
    known = Usage(last=usage.last[layers, experts], count=usage.count[layers, experts], following=following)
    order = np.lexsort(policy(known))
    return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
