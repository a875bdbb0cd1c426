"""Affinity: which resident expert stands in for one that is not, by the distance of their weights (SpecMoE, substitution)."""

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

SMALL_WEIGHTS = 1 << 20


def expert_distances(read_block: Callable[[int], np.ndarray], num_experts: int, block_size: int = 1 << 14) -> np.ndarray:
    """L2 distance between every pair of a layer's experts over all their weights, [E, E] float32.

    From the Gram matrix, in float64, of the experts less their mean: E^2 dot products at BLAS speed, where pairwise
    differences take 128 experts of 4.7 M weights about a minute a layer. Distances do not change when the mean goes,
    and with it goes what all experts share, which is what makes |a|^2 + |b|^2 - 2ab cancel; equal experts come out
    at about 1e-8 of their distance to the mean, not at 0. The diagonal is exactly 0.

    read_block: expert id -> [3, F, M], float32 or uint16 holding the bits of bfloat16; called once an expert, and the
    blocks are held, so it should return a view. block_size: weights of each expert in work at a time; it is lowered
    where needed so that, beside the blocks, less than two experts' worth of memory (or a few MB) is alive.
    """
    blocks = [np.reshape(read_block(e), -1) for e in range(num_experts)]
    weights = blocks[0].size
    # [E, step] float64: 2 bytes a weight of one expert. Where experts are small a few MB are better: products of 128 by
    # 48 kept two busy cores for half a minute.
    step = max(1, min(block_size, max(weights, SMALL_WEIGHTS) // (4 * num_experts)))
    gram = np.zeros((num_experts, num_experts))
    for start in range(0, weights, step):
        gram += _centred_gram([block[start : start + step] for block in blocks])
    norms = np.diagonal(gram)
    squared = norms[:, None] + norms[None, :] - 2 * gram
    np.fill_diagonal(squared, 0)
    return np.sqrt(np.maximum(squared, 0)).astype(np.float32)


def neighbours(distances: np.ndarray) -> np.ndarray:
    """Experts by distance: row e of [E, E] int32 is every expert, e first, then nearest first, ties to the smaller id.

    >>> neighbours(np.array([[0, 5, 1], [5, 0, 2], [1, 2, 0]])).tolist()
    [[0, 2, 1], [1, 2, 0], [2, 0, 1]]
    """
    distances = np.array(distances, np.float64)
    np.fill_diagonal(distances, -1)
    return np.argsort(distances, axis=1, kind="stable").astype(np.int32)


def substitutes(neighbours: np.ndarray, resident: np.ndarray) -> np.ndarray:
    """The expert that computes for each expert while drafting, [E] int32: itself if resident, else the nearest resident one.

    neighbours: [E, E] int32; resident: [E] bool. Raises ValueError when no expert is resident.

    >>> substitutes(np.array([[0, 2, 1], [1, 2, 0], [2, 0, 1]]), resident=[True, True, False]).tolist()
    [0, 1, 0]
    """
    is_resident = np.asarray(resident, bool)[neighbours]
    if not is_resident.any():
        raise ValueError("no expert is resident, so none can stand in for the others; keep at least one")
    nearest = is_resident.argmax(axis=1)
    return np.take_along_axis(neighbours, nearest[:, None], axis=1)[:, 0]


def save_table(path: str | os.PathLike, neighbours: np.ndarray) -> None:
    """Writes the neighbour lists of a model, [L, E, E] int32, to an npz file: the whole file or none of it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, neighbours=np.asarray(neighbours, np.int32))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_table(path: str | os.PathLike, num_layers: int, num_experts: int) -> np.ndarray:
    """Reads what `save_table` wrote, [L, E, E] int32.

    Raises FileNotFoundError when there is no file, ValueError when it is not the table of such a model; the caller
    then computes it anew.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            table = file["neighbours"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} is not a neighbour table ({e}); delete it and it is computed anew") from e
    shape, experts = (num_layers, num_experts, num_experts), np.arange(num_experts)
    if table.shape != shape or (np.sort(table, axis=-1) != experts).any() or (table[..., 0] != experts).any():
        raise ValueError(f"{path} holds no neighbour lists of shape {shape}; delete it and they are computed anew")
    return table.astype(np.int32)


def _centred_gram(rows: list[np.ndarray]) -> np.ndarray:
    """Dot products [E, E] float64 of E rows less their mean."""
    chunk = np.stack([_as_float(row) for row in rows], dtype=np.float64)
    chunk -= chunk.mean(axis=0)
    return chunk @ chunk.T


def _as_float(weights: np.ndarray) -> np.ndarray:
    """Weights as float32; uint16 holds the bits of bfloat16."""
    if weights.dtype == np.uint16:
        return (weights.astype(np.uint32) << 16).view(np.float32)
    if weights.dtype != np.float32:
        raise ValueError(f"an expert's weights are {weights.dtype}; they must be float32 or uint16 (bfloat16 bits)")
    return weights
