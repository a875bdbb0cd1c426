"""Which experts of a layer stay on the accelerator between passes: SpecMoE's policies and our ablations. Pure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.speculate.hot_experts.usage import hot_set

DECAY = 0.8  # weight of the past per step under "decay": half of it is gone after three steps


class DraftSetPolicy(NamedTuple):
    """Experts are ranked by a score per layer; what the score remembers from step to step are the votes.

    scores: (votes [E], counts [E], layer) -> [E], while the layer is being verified. counts: choices of this
        pass (and of the earlier chunks of a prefill).
    update: (votes [L, E], counts [L, E], accepted [L, E]) -> [L, E], after the step. accepted: choices of the
        positions whose tokens were committed.
    resting: in the place of scores while a guard rests from drafting; None: the same.
    """

    scores: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    update: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    resting: Callable[[np.ndarray, np.ndarray, int], np.ndarray] | None = None


def hot_temporal() -> DraftSetPolicy:
    """SpecMoE's: the latest pass alone votes, so the chosen were just fetched and the switch moves nothing."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: counts, update=lambda usage_scores, counts, accepted: np.zeros_like(usage_scores)
    )


def guarded_hot_temporal() -> DraftSetPolicy:
    """The same under a guard: while it rests, a pass is one token a row, a poor guide, and all passes vote as in hot_global."""
    return hot_global()._replace(scores=hot_temporal().scores, resting=hot_global().scores)


def hot_global() -> DraftSetPolicy:
    """SpecMoE's ablation: the most used over all. Deviation: counted while running, not profiled beforehand."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: usage_scores + counts,
        update=lambda usage_scores, counts, accepted: usage_scores + counts,
    )


def decayed() -> DraftSetPolicy:
    """Ours: between the two, older passes fade by DECAY a step."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: DECAY * usage_scores + counts,
        update=lambda usage_scores, counts, accepted: DECAY * usage_scores + counts,
    )


def accepted_only() -> DraftSetPolicy:
    """Ours: only committed positions vote, known after the pass, so the set lags by a step and may have to move."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: usage_scores,
        update=lambda usage_scores, counts, accepted: accepted.astype(usage_scores.dtype),
    )


def random_set(num_layers: int, num_experts: int, seed: int = 0) -> DraftSetPolicy:
    """SpecMoE's ablation: a set drawn once."""
    fixed = np.random.default_rng(seed).random((num_layers, num_experts))
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: fixed[layer], update=lambda usage_scores, counts, accepted: usage_scores
    )


def make_policy(name: str, num_layers: int, num_experts: int, *, guard: bool = False) -> DraftSetPolicy:
    """The policy of a plan's `draft_set`. guard: whether the plan has one."""
    if name == "random":
        return random_set(num_layers, num_experts)
    if name == "hot_temporal" and guard:
        return guarded_hot_temporal()
    return {
        "hot_temporal": hot_temporal,
        "hot_global": hot_global,
        "decay": decayed,
        "accepted": accepted_only,
    }[name]()


def keep_rule(policy: DraftSetPolicy, sizes: Sequence[int]) -> Callable[..., np.ndarray]:
    """(layer, usage scores [E], counts [E], resident [E], resting) -> [E] bool: the `sizes[layer]` best experts by the policy."""

    def keep(layer: int, usage_scores: np.ndarray, counts: np.ndarray, resident: np.ndarray, resting: bool = False) -> np.ndarray:
        scores = policy.resting if resting and policy.resting else policy.scores
        return hot_set(scores(usage_scores, counts, layer), resident, sizes[layer])

    return keep
