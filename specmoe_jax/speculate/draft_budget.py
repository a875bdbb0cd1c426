"""How many draft experts each layer gets, out of a total: by how much of the routing they cover. Pure; ours, beyond the paper."""

import numpy as np


def spread(usage: np.ndarray, total: int) -> tuple[int, ...]:
    """N per layer, at least 1 each, with the sum `total`, that maximises the routing covered by the N most used of each layer.

    usage: [L, E], how often each expert was chosen, for instance the usage scores of draft_set=hot_global. A layer that keeps to
    few experts needs few; one that uses all alike gains little from one more either. What each further expert of a layer
    covers never grows, so taking the most covering one again and again is optimal. Ties go to the earlier layer. Raises
    ValueError for a total that is not between L and L * E.
    """
    layers, experts = usage.shape
    if not layers <= total <= layers * experts:
        raise ValueError(f"{total} draft experts for {layers} layers of {experts}; expected {layers} to {layers * experts}")
    shares = -np.sort(-usage / np.maximum(usage.sum(axis=1, keepdims=True), 1), axis=1)
    shares[:, 0] = np.inf  # every layer has one
    best = np.argsort(-shares, axis=None, kind="stable")[:total]
    return tuple(np.bincount(best // experts, minlength=layers).tolist())
