"""Measures of how unevenly something is spread."""

import numpy as np


def gini(counts: np.ndarray) -> np.ndarray:
    """Gini coefficient of counts [..., E] along the last axis: 0 where all are alike or all are 0, near 1 where one has
    everything."""
    ordered = np.sort(np.asarray(counts, float), axis=-1)
    size = ordered.shape[-1]
    weighted = (np.arange(1, size + 1) * ordered).sum(-1)
    total = ordered.sum(-1)
    return np.where(total > 0, 2 * weighted / (size * np.where(total > 0, total, 1)) - (size + 1) / size, 0.0)
