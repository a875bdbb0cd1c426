"""A routing trace replayed against cache policies: how many experts each would have fetched, beside Belady's optimum. Pure.

A trace is [S, L, E] counts: how often each expert was chosen in pass s. Every pass visits its layers in order, and needs each
expert of a layer with a count above 0 once. `capacity` experts of any layer are kept between the visits; the dispatch of the layer
at work is beside them, as in the engine.
"""

import functools
from collections.abc import Callable

import numpy as np

from specmoe_jax.config.registry import DRAFT_SETS, HOST_CACHE_POLICIES
from specmoe_jax.offload.host_cache_policies import HostCachePolicy, Usage, Visits, eviction_order, expected_wait, visited
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy, keep_rule, make_policy
from specmoe_jax.support.errors import PlanError


def replay(trace: np.ndarray, capacity: int, *, progress: Callable[[], object] = lambda: None) -> dict[str, int]:
    """Fetches of every policy, and "needed": visits that any policy serves from somewhere. Raises PlanError for no trace.

    progress: called after each policy.
    """
    if trace.ndim != 3 or not np.issubdtype(trace.dtype, np.integer) or (trace < 0).any():
        raise PlanError(f"a routing trace is [S, L, E] counts; got {trace.dtype} {list(trace.shape)}")
    if not 0 <= capacity <= trace.shape[1] * trace.shape[2]:
        raise PlanError(f"capacity is {capacity}; the trace has {trace.shape[1] * trace.shape[2]} experts")
    fetched = {"needed": int((trace > 0).sum())}
    for name, policy in policies().items():
        fetched[name] = policy(trace, capacity)
        progress()
    return fetched


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


def cached(trace: np.ndarray, capacity: int, policy: HostCachePolicy) -> int:
    """Fetches of a cache that keeps, after each visit, the experts that its policy evicts last."""
    shape = trace.shape[1:]
    kept = np.zeros(shape, bool)
    last, count, needed_next = (np.zeros(shape, np.int64) for _ in range(3))
    seen = Visits(uses=np.zeros(shape), visits=np.zeros(shape[0]))
    fetched = clock = 0
    for (_, layer, ids), following in zip(_visits(trace), _next_visits(trace), strict=True):
        fetched += int((~kept[layer, ids]).sum())
        kept[layer, ids] = True
        last[layer, ids] = clock + 1 + np.arange(len(ids))
        count[layer, ids] += 1
        needed_next[layer, ids] = following
        clock += len(ids)
        seen = visited(seen, layer, ids)
        usage = Usage(last=last, count=count, now=clock, wait=expected_wait(seen), following=needed_next)
        for victim in eviction_order(policy, usage, kept)[: max(int(kept.sum()) - capacity, 0)]:
            kept[victim] = False
    return fetched


def furthest_next_use(usage: Usage) -> tuple[np.ndarray, ...]:
    """The optimum (Belady 1966, with bypassing): the experts that are needed soonest stay."""
    return (-np.asarray(usage.following),)


def _next_visits(trace: np.ndarray) -> list[np.ndarray]:
    """Of each visit, at which visit its experts are needed next; the number of visits where they never are."""
    visits = list(_visits(trace))
    following = np.full(trace.shape[1:], len(visits))
    found = []
    for at in range(len(visits) - 1, -1, -1):
        _, layer, ids = visits[at]
        found.append(following[layer, ids])
        following[layer, ids] = at
    return found[::-1]


def per_layer(trace: np.ndarray, capacity: int, policy: DraftSetPolicy, kept: np.ndarray | None = None) -> int:
    """Fetches where equal shares of the layers keep what a draft-set policy ranks highest, decided after each visit.

    kept: [L, E] bool, the experts cached before the first pass; None for none. Every choice of a trace counts as accepted.
    """
    fetched, layers = 0, range(trace.shape[1])
    keep = keep_rule(policy, [capacity // len(layers)] * len(layers))
    held: np.ndarray = np.zeros(trace.shape[1:], bool) if kept is None else kept
    usage_scores = np.zeros(trace.shape[1:])
    for counts in trace:
        needed = counts > 0
        fetched += int((needed & ~held).sum())
        chosen = np.stack([keep(layer, usage_scores[layer], counts[layer], held[layer]) for layer in layers])
        held = chosen & (held | needed)  # an absent expert that was not needed is not fetched
        usage_scores = policy.update(usage_scores, counts, counts)
    return fetched


def _draft_set(trace: np.ndarray, capacity: int, name: str) -> int:
    return per_layer(trace, capacity, make_policy(name, *trace.shape[1:]))


def _static(trace: np.ndarray, capacity: int) -> int:
    """MoE-Caching with hindsight: the most used of the whole trace, there from the start (its loading is not counted)."""
    uses = (trace > 0).sum(axis=0).ravel()
    return int(uses.sum() - np.sort(uses)[::-1][:capacity].sum())


def _nothing(trace: np.ndarray, capacity: int) -> int:
    """MoE-OnDemand."""
    return int((trace > 0).sum())


def policies() -> dict[str, Callable[[np.ndarray, int], int]]:
    """The policies of a replay: no cache, every policy of the host cache and of draft sets, and the two with hindsight."""
    caches = {name: functools.partial(cached, policy=HOST_CACHE_POLICIES.description(name)) for name in HOST_CACHE_POLICIES}
    sets = {name: functools.partial(_draft_set, name=name) for name in DRAFT_SETS}
    hindsight = {"static": _static, "belady": functools.partial(cached, policy=furthest_next_use)}
    return {"on_demand": _nothing} | caches | sets | hindsight
