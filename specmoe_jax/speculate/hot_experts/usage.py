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
    hot = np.zeros(len(counts), bool)
    hot[_best_first(counts, resident)[:size]] = True
    return hot


def shared_hot_set(counts: np.ndarray, resident: np.ndarray, size: int, homes: np.ndarray, devices: int) -> np.ndarray:
    """As `hot_set`, of experts that belong to several devices (homes [E]), none of which has more than an equal share of the set.

    A pass waits in every layer for the device that brings most: where one keeps all, the others bring all that they have. A layer
    of which some device has fewer experts than its share may give a smaller set.

    >>> shared_hot_set(np.array([3, 1, 2, 0]), np.zeros(4, bool), size=2, homes=np.array([0, 1, 0, 1]), devices=2).tolist()
    [True, True, False, False]
    """
    order = _best_first(counts, resident)
    place, hot = np.zeros(len(order), np.int64), np.zeros(len(order), bool)  # place: among those of the same device
    for device in range(devices):
        own = homes[order] == device
        place[own] = np.arange(own.sum())
    hot[order[place < -(-size // devices)][:size]] = True
    return hot


def _best_first(counts: np.ndarray, resident: np.ndarray) -> np.ndarray:
    """[E], experts in the order in which a hot set takes them."""
    return np.lexsort((~np.asarray(resident, bool), -np.asarray(counts)))  # stable: then the smaller id
