"""A routing trace replayed against cache policies: how many experts each would have fetched, beside Belady's optimum. Pure.

A trace is [S, L, E] counts: how often each expert was chosen in pass s. Every pass visits its layers in order, and needs each
expert of a layer with a count above 0 once. `capacity` experts of any layer are kept between the visits; the dispatch of the layer
at work is beside them, as in the engine.
"""

from collections.abc import Callable

import numpy as np

from specmoe_jax.support.errors import PlanError


def replay(trace: np.ndarray, capacity: int) -> dict[str, int]:
    """Fetches of every policy, and "needed": visits that any policy serves from somewhere. Raises PlanError for no trace."""
    if trace.ndim != 3 or not np.issubdtype(trace.dtype, np.integer) or (trace < 0).any():
        raise PlanError(f"a routing trace is [S, L, E] counts; got {trace.dtype} {list(trace.shape)}")
    if not 0 <= capacity <= trace.shape[1] * trace.shape[2]:
        raise PlanError(f"capacity is {capacity}; the trace has {trace.shape[1] * trace.shape[2]} experts")
    return {"needed": int((trace > 0).sum())} | {name: policy(trace, capacity) for name, policy in POLICIES.items()}


def synthetic_trace(
    probabilities: tuple[float, ...], per_token: int, *, layers: int, passes: int, tokens: int, seed: int = 0
) -> np.ndarray:
    """[S, L, E]: `tokens` tokens a pass choose `per_token` different experts each, independently. Hot experts differ by layer."""
    rng = np.random.default_rng(seed)
    p = np.clip(np.asarray(probabilities), 1e-12, 1 - 1e-12)
    # Exponential clocks whose rate is -log(1 - p): each alone rings within one unit of time with probability p.
    clocks = rng.exponential(size=(passes, layers, tokens, len(p))) / -np.log1p(-p)
    chosen = np.argpartition(clocks, per_token - 1, axis=-1)[..., :per_token]
    counts = np.zeros((passes, layers, len(p)), np.int64)
    np.add.at(counts, (np.arange(passes)[:, None, None, None], np.arange(layers)[:, None, None], chosen), 1)
    order = np.argsort(rng.random((layers, len(p))), axis=1)
    return np.take_along_axis(counts, order[None], axis=2)


def _visits(trace: np.ndarray):
    """(pass, layer, ids of the experts needed), in order."""
    for s, step in enumerate(trace):
        for layer, counts in enumerate(step):
            yield s, layer, np.flatnonzero(counts)


def _keyed(trace: np.ndarray, capacity: int, eviction_priority: Callable[[dict], Callable]) -> int:
    """Keeps what is worth most after each visit. worth: statistics -> key of an expert -> number."""
    seen = {"last": {}, "uses": {}, "clock": 0}
    kept, fetched, value = set(), 0, eviction_priority(seen)
    for _, layer, ids in _visits(trace):
        keys = [(layer, int(i)) for i in ids]
        fetched += sum(key not in kept for key in keys)
        for key in keys:
            seen["clock"] += 1
            seen["last"][key], seen["uses"][key] = seen["clock"], seen["uses"].get(key, 0) + 1
        kept = set(sorted(kept.union(keys), key=value, reverse=True)[:capacity])
    return fetched


def _lru(trace: np.ndarray, capacity: int) -> int:
    """Least recently used."""
    return _keyed(trace, capacity, lambda seen: lambda key: seen["last"][key])


def _frequency(trace: np.ndarray, capacity: int) -> int:
    """Least often used, then least recently."""
    return _keyed(trace, capacity, lambda seen: lambda key: (seen["uses"][key], seen["last"][key]))


def _belady(trace: np.ndarray, capacity: int) -> int:
    """The optimum (Belady 1966, with leave to keep nothing of a visit): what is needed soonest stays."""
    visits = [(layer, ids) for _, layer, ids in _visits(trace)]
    following: dict[tuple[int, int], int] = {}
    after = []  # of each visit, when its experts are needed next
    for at in range(len(visits) - 1, -1, -1):
        layer, ids = visits[at]
        keys = [(layer, int(i)) for i in ids]
        after.append({key: following.get(key, len(visits)) for key in keys})
        following |= dict.fromkeys(keys, at)
    kept: dict[tuple[int, int], int] = {}
    fetched = 0
    for soon in reversed(after):
        fetched += sum(key not in kept for key in soon)
        kept |= soon
        kept = dict(sorted(kept.items(), key=lambda entry: entry[1])[:capacity])
    return fetched


def per_layer(trace: np.ndarray, capacity: int, counts_of: Callable[[int], np.ndarray], kept: np.ndarray | None = None) -> int:
    """Equal shares of the layers keep their most used experts by counts_of(pass) [L, E], decided after that pass's visit.

    kept: [L, E] bool, what is there before the first pass; None for nothing.
    """
    share, fetched = capacity // trace.shape[1], 0
    kept = np.zeros(trace.shape[1:], bool) if kept is None else kept
    for s, step in enumerate(trace):
        needed = step > 0
        fetched += int((needed & ~kept).sum())
        counts = 2 * counts_of(s) + kept  # ties: what is resident, as in the engine
        best = np.argsort(-counts, axis=1, kind="stable")[:, :share]
        chosen = np.zeros_like(kept)
        np.put_along_axis(chosen, best, True, axis=1)
        chosen &= kept | needed  # what is not at hand is not fetched to be kept
        kept = chosen
    return fetched


def _hot_temporal(trace: np.ndarray, capacity: int) -> int:
    """SpecMoE: the most used of the latest pass."""
    return per_layer(trace, capacity, lambda s: trace[s])


def _hot_global(trace: np.ndarray, capacity: int) -> int:
    """The most used so far."""
    total = np.cumsum(trace, axis=0)
    return per_layer(trace, capacity, lambda s: total[s])


def _static(trace: np.ndarray, capacity: int) -> int:
    """MoE-Caching with hindsight: the most used of the whole trace, there from the start (its loading is not counted)."""
    uses = (trace > 0).sum(axis=0).ravel()
    return int(uses.sum() - np.sort(uses)[::-1][:capacity].sum())


def _nothing(trace: np.ndarray, capacity: int) -> int:
    """MoE-OnDemand."""
    return int((trace > 0).sum())


POLICIES: dict[str, Callable[[np.ndarray, int], int]] = {
    "on_demand": _nothing,
    "lru": _lru,
    "frequency": _frequency,
    "hot_temporal": _hot_temporal,
    "hot_global": _hot_global,
    "static": _static,
    "belady": _belady,
}
