"""A routing trace replayed against cache policies: how many experts each would have fetched, beside Belady's optimum. Pure.

A trace is [S, L, E] counts: how often each expert was chosen in pass s. Every pass visits its layers in order, and needs each
expert of a layer with a count above 0 once. `capacity` experts of any layer are kept between the visits; the dispatch of the layer
at work is beside them, as in the engine.
"""

import functools
from collections.abc import Callable

import numpy as np

from specmoe_jax.config.registry import DRAFT_SETS, HOST_CACHE_POLICIES, RETAIN_POLICIES
from specmoe_jax.offload.host_cache_policies import HostCachePolicy, Usage, Visits, eviction_order, expected_wait, visited
from specmoe_jax.offload.retained_experts import DECAY
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy, keep_rule, make_policy
from specmoe_jax.support.errors import PlanError


def replay(
    trace: np.ndarray, capacity: int, *, drafted: np.ndarray | None = None, progress: Callable[[], object] = lambda: None
) -> dict[str, int]:
    """Fetches of every policy, and "needed": visits that any policy serves from somewhere. Raises PlanError for no trace.

    drafted: [S, L, E], how often the draft before each pass chose each expert, for the policies that look at it. progress: called
    after each policy.
    """
    if trace.ndim != 3 or not np.issubdtype(trace.dtype, np.integer) or (trace < 0).any():
        raise PlanError(f"a routing trace is [S, L, E] counts; got {trace.dtype} {list(trace.shape)}")
    if not 0 <= capacity <= trace.shape[1] * trace.shape[2]:
        raise PlanError(f"capacity is {capacity}; the trace has {trace.shape[1] * trace.shape[2]} experts")
    fetched = {"needed": int((trace > 0).sum())}
    for name, policy in policies(drafted).items():
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


def cached(trace: np.ndarray, capacity: int, policy: HostCachePolicy, drafted: np.ndarray | None = None) -> int:
    """Fetches of a cache that keeps, after each visit, the experts that its policy evicts last."""
    return int(fetches(trace, capacity, policy, drafted).sum())


def fetches(trace: np.ndarray, capacity: int, policy: HostCachePolicy, drafted: np.ndarray | None = None) -> np.ndarray:
    """[S, L], those of each visit. drafted: as of `replay`."""
    shape, found = trace.shape[1:], np.zeros(trace.shape[:2], np.int64)
    kept = np.zeros(shape, bool)
    last, count, needed_next = (np.zeros(shape, np.int64) for _ in range(3))
    seen = Visits(uses=np.zeros(shape), visits=np.zeros(shape[0]))
    fading, clock, ahead = np.zeros(shape), 0, None
    for (s, layer, ids), following in zip(_visits(trace), _next_visits(trace), strict=True):
        found[s, layer] = (~kept[layer, ids]).sum()
        kept[layer, ids] = True
        fading[layer] = DECAY * fading[layer] + trace[s, layer]
        last[layer, ids] = clock + 1 + np.arange(len(ids))
        count[layer, ids] += 1
        needed_next[layer, ids] = following
        clock += len(ids)
        seen = visited(seen, layer, ids)
        if drafted is not None:
            ahead = np.where(np.arange(shape[0])[:, None] > layer, drafted[s], 0)
        wait = expected_wait(seen)
        usage = Usage(last=last, count=count, now=clock, wait=wait, following=needed_next, fading=fading, drafted=ahead)
        for victim in eviction_order(policy, usage, kept)[: max(int(kept.sum()) - capacity, 0)]:
            kept[victim] = False
    return found


def link_bound_s(fetched: np.ndarray, *, expert_s: float, layer_s: float, ahead: bool) -> float:
    """Seconds of passes whose layers compute for `layer_s` and fetch so many experts [S, L] first, each in `expert_s`.

    ahead: a perfect prefetch of one layer, whose copies begin when the layer before it begins to compute.
    """
    now_s = link_free_s = may_begin_s = 0.0
    for count in fetched.ravel().tolist():
        link_free_s = max(link_free_s, may_begin_s if ahead else now_s) + count * expert_s
        began_s = max(now_s, link_free_s) if count else now_s
        now_s, may_begin_s = began_s + layer_s, began_s
    return now_s


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


def policies(drafted: np.ndarray | None = None) -> dict[str, Callable[[np.ndarray, int], int]]:
    """The policies of a replay: no cache, those of the host cache, of retained experts and of draft sets, and two with hindsight.

    drafted: as of `replay`; those that look at it are left out without it.
    """
    caches = {name: functools.partial(cached, policy=HOST_CACHE_POLICIES.description(name)) for name in HOST_CACHE_POLICIES}
    for name in RETAIN_POLICIES:
        policy = RETAIN_POLICIES.description(name)
        if drafted is not None or not policy.by_draft:
            caches.setdefault(name, functools.partial(cached, policy=policy.keys, drafted=drafted))
    sets = {name: functools.partial(_draft_set, name=name) for name in DRAFT_SETS}
    hindsight = {"static": _static, "belady": functools.partial(cached, policy=furthest_next_use)}
    return {"on_demand": _nothing} | caches | sets | hindsight
