"""Carving: which neurons of a dense SwiGLU layer become the shared expert, which the routed ones, and their router. Pure.

A dense MLP is a sum over its neurons, so any partition of them into groups gives the same sum; an MoE leaves some groups
out for each token. Partitions by activation are MoEfication's (Zhang et al. 2022); a shared expert of the neurons that
are always on, and a router computed instead of trained, are CMoE's (Pei et al. 2025). Ours: importance by contribution,
balanced clusters of contribution patterns, and a ridge regression as the router. Nothing here is trained.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize

ROUNDS = 5  # of the clustering; it hardly moves after three
RIDGE = 1e-2  # of the mean square of an input number
ROUTER_SCALE = 1e-3  # of the router's logits: under norm_topk_prob the chosen weights are then equal within about 1e-3


class Sizes(NamedTuple):
    """shared: neurons of the shared expert. experts: E, of which a token takes top_k."""

    shared: int
    experts: int
    top_k: int


class Carved(NamedTuple):
    """shared: [S], groups: [E, F] neuron ids, together each exactly once. router: [E, M] float32."""

    shared: np.ndarray
    groups: np.ndarray
    router: np.ndarray


def carve(x: np.ndarray, hidden: np.ndarray, down: np.ndarray, sizes: Sizes, *, seed: int = 0) -> Carved:
    """x: [n, M], inputs of the MLP over a calibration text; hidden: [n, N], its neurons' activations; down: [M, N].

    All float32. (N - shared) must be a multiple of E.
    """
    contribution = np.abs(hidden) * np.linalg.norm(down, axis=0)  # [n, N]: how long is what each neuron adds to the residual
    order = np.argsort(-contribution.mean(axis=0), kind="stable")
    shared, rest = np.sort(order[: sizes.shared]), np.sort(order[sizes.shared :])
    groups = rest[balanced_clusters(contribution[:, rest].T, sizes.experts, seed=seed)]
    # Where every expert is chosen the router decides nothing but the weights, which must be equal.
    router = np.zeros((sizes.experts, x.shape[1]), np.float32)
    if sizes.top_k < sizes.experts:
        sums = np.stack([hidden[:, group] @ down[:, group].T for group in groups], axis=1)  # [n, E, M]
        router = ROUTER_SCALE * ridge_router(x, np.linalg.norm(sums, axis=-1))
    return Carved(shared=shared, groups=groups, router=router)


def balanced_clusters(patterns: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """`count` groups of equal size of the rows of patterns [N, n], by direction: spherical k-means with an exact assignment.

    -> [count, N / count] row numbers, ascending within a group. The assignment is cubic in N: a second for 4,000 rows.
    """
    rows = patterns / np.maximum(np.linalg.norm(patterns, axis=1, keepdims=True), 1e-12)
    size = len(rows) // count
    centres = rows[np.random.default_rng(seed).permutation(len(rows))[:count]]
    for _ in range(ROUNDS):
        affinity = rows @ centres.T  # [N, count]
        _, seat = scipy.optimize.linear_sum_assignment(-np.repeat(affinity, size, axis=1))
        group = seat // size
        centres = np.stack([rows[group == g].mean(axis=0) for g in range(count)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return np.stack([np.flatnonzero(group == g) for g in range(count)])


def ridge_router(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[E, M] float32: logits x @ router.T that estimate how much longer an expert's output is than the token's others'.

    x: [n, M]; lengths: [n, E]. Scaled so that the logits over the text have a standard deviation of 1.
    """
    x = x.astype(np.float64)
    wanted = lengths - lengths.mean(axis=1, keepdims=True)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    router = np.linalg.solve(gram, x.T @ wanted).T
    return (router / max((x @ router.T).std(), 1e-12)).astype(np.float32)
