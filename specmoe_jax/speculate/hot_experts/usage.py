"""HotTemporal: the experts a pass chose most often become the next draft experts (SpecMoE, draft expert selection)."""

import numpy as np


def count_choices(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert was chosen: ids [n, A] int, -1 for padding and finished rows -> [E] int64.

    Raises ValueError for an id of E or more.

    >>> count_choices(np.array([[2, 0], [2, -1]]), num_experts=4).tolist()
    [1, 0, 2, 0]
    """
    ids = np.asarray(ids)
    counts = np.bincount(ids[ids >= 0], minlength=num_experts)
    if len(counts) > num_experts:
        raise ValueError(f"expert id {len(counts) - 1} was chosen; there are {num_experts} experts")
    return counts.astype(np.int64)


def hot_set(counts: np.ndarray, resident: np.ndarray, size: int) -> np.ndarray:
    """The `size` most chosen experts, [E] bool. Ties (ours): keep the one already resident, then the smaller id.

    So when `size` experts are resident, every member was chosen in the pass or is resident: a refresh after a pass
    moves no byte beyond what the pass fetched. counts: [E], signed; resident: [E] bool. Raises ValueError when there
    are fewer than `size` experts.

    >>> hot_set(np.array([3, 1, 1, 0]), resident=np.array([False, False, True, True]), size=2).tolist()
    [True, False, True, False]
    """
    if not 0 <= size <= len(counts):
        raise ValueError(f"the hot set is to hold {size} experts; there are {len(counts)}")
    order = np.lexsort((~np.asarray(resident, bool), -np.asarray(counts)))  # stable: then the smaller id
    hot = np.zeros(len(counts), bool)
    hot[order[:size]] = True
    return hot
