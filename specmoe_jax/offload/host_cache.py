"""Which experts of a disk tier stay in host memory: the cache's decisions. Pure: integers in, integers out."""

import itertools
import operator
from typing import NamedTuple

import numpy as np

from specmoe_jax.offload.host_cache_policies import HostCachePolicy, Usage, Visits, eviction_order, expected_wait, visited


class HostCache(NamedTuple):
    """present: [L, E] bool, experts in host memory or on their way into it. uses: [L, E], how often each was asked for.

    last_use: [L, E], the value of `clock` when it last was. clock: uses so far. visits: of the layers, lately.
    """

    present: np.ndarray
    uses: np.ndarray
    last_use: np.ndarray
    clock: int
    visits: Visits


class Admission(NamedTuple):
    """admitted, evicted: lists of (layer, expert). Evict first, so that the budget holds at every moment."""

    admitted: list[tuple[int, int]]
    evicted: list[tuple[int, int]]


def empty(num_layers: int, num_experts: int) -> HostCache:
    """Nothing in host memory."""
    zeros = np.zeros((num_layers, num_experts), np.int64)
    visits = Visits(uses=np.zeros((num_layers, num_experts)), visits=np.zeros(num_layers))
    return HostCache(present=zeros > 0, uses=zeros, last_use=zeros, clock=0, visits=visits)


def touch(cache: HostCache, keys: list[tuple[int, int]]) -> HostCache:
    """The cache after one use of each of these experts (layer, expert), present or not, in this order."""
    uses, last_use = cache.uses.copy(), cache.last_use.copy()
    for clock, key in enumerate(keys, cache.clock + 1):
        uses[key] += 1
        last_use[key] = clock
    visits = cache.visits
    for layer, of_layer in itertools.groupby(keys, operator.itemgetter(0)):
        visits = visited(visits, layer, [expert for _, expert in of_layer])
    return cache._replace(uses=uses, last_use=last_use, clock=cache.clock + len(keys), visits=visits)


def admit(
    cache: HostCache, wanted: list[tuple[int, int]], *, capacity: int, policy: HostCachePolicy, protected: np.ndarray
) -> tuple[Admission, HostCache]:
    """Makes room for absent experts, in the order of `wanted`, until nothing more may be evicted.

    Neither a wanted nor a `protected` [L, E] expert is evicted; so of more wanted than `capacity` the first are admitted.
    """
    present, keep = cache.present.copy(), protected.copy()
    keep[tuple(np.transpose(wanted))] = True
    wanted = [key for key in dict.fromkeys(wanted) if not present[key]]
    usage = Usage(last=cache.last_use, count=cache.uses, now=cache.clock, wait=expected_wait(cache.visits))
    order = iter(eviction_order(policy, usage, present & ~keep))
    admitted, evicted, room = [], [], capacity - int(present.sum())
    for key in wanted:
        if room <= 0:
            victim = next(order, None)
            if victim is None:
                break
            present[victim] = False
            evicted.append(victim)
            room += 1
        present[key] = True
        admitted.append(key)
        room -= 1
    return Admission(admitted=admitted, evicted=evicted), cache._replace(present=present)


def by_expectation(predicted: np.ndarray, absent: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """At most `limit` experts worth reading ahead: nearest layer first, then most expected, then the smaller id.

    predicted: [L, E], how often each is expected to be chosen, 0 = not. absent: [L, E] bool.
    """
    layers, experts = np.nonzero((predicted > 0) & absent)
    order = np.lexsort((experts, -predicted[layers, experts], layers))[:limit]
    return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
