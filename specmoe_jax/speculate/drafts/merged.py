"""Merged experts: each layer's experts in K groups, a group's usage-weighted mean in the place of its members while drafting."""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from specmoe_jax.speculate.hot_experts.affinity import substitutes
from specmoe_jax.speculate.hot_experts.usage import hot_set


class Groups(NamedTuple):
    """of: [E] int32, the group 0..K-1 of each expert. weights: [E] float64, shares that sum to 1 within each group."""

    of: np.ndarray
    weights: np.ndarray


def group_experts(counts: np.ndarray, neighbours: np.ndarray, size: int, most: int | None = None) -> Groups:
    """`size` groups of a layer's experts (M-SMoE, Li et al. 2024): the most used are the centres, the others join the nearest.

    counts: [E], how often the router chose each; one is added, so that an expert unseen so far still counts. neighbours:
    [E, E], by affinity. most: only so many experts, the most used, are averaged; the others are stood for alike. None for all.
    Deviation: the members join by the distance of their weights, not by the similarity of their router logits, and hidden
    units are not permuted to match before the mean (an assignment problem in F per pair of experts).
    """
    centres = hot_set(counts, np.zeros(len(counts), bool), size)
    of = (np.cumsum(centres) - 1)[substitutes(neighbours, centres)]
    usage = np.asarray(counts, np.float64) + 1
    if most is not None:
        usage *= hot_set(counts, centres, max(most, size))
    return Groups(of=of.astype(np.int32), weights=usage / np.bincount(of, usage, minlength=size)[of])


def merge(read_block: Callable[[int], np.ndarray], groups: Groups, group: int) -> np.ndarray:
    """The block [3, F, M] of a group, float32 or uint16 holding the bits of bfloat16, as `read_block(expert)` gives them.

    The sum is float32, one member after the other, so that little more than two blocks are in memory at a time.
    """
    total, dtype = None, None
    for expert in np.flatnonzero((groups.of == group) & (groups.weights > 0)):
        block = read_block(int(expert))
        dtype = block.dtype
        share = np.float32(groups.weights[expert]) * _as_float(block)
        total = share if total is None else np.add(total, share, out=total)
    assert total is not None  # a group has members
    return total if dtype == np.float32 else total.astype(ml_dtypes.bfloat16).view(np.uint16)


def _as_float(block: np.ndarray) -> np.ndarray:
    return block if block.dtype == np.float32 else block.view(ml_dtypes.bfloat16).astype(np.float32)
