"""Which experts of a layer stay on the accelerator between passes: SpecMoE's policies and our ablations. Pure.

A policy is made by a function of a Setting; a new one is such a function here and a line in config/registry.py.
Engine(draft_set=...) takes a custom policy.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.registry import DRAFT_SETS
from specmoe_jax.speculate.hot_experts.usage import hot_set, shared_hot_set

DECAY = 0.8  # weight of the past per step under "decay": half of it is gone after three steps


class DraftSetPolicy(NamedTuple):
    """Experts are ranked by a score per layer; usage scores are its memory from step to step.

    scores: (usage scores [E], counts [E], layer) -> [E], while the layer is being verified. counts: choices of this
        pass (and of the earlier chunks of a prefill).
    update: (usage scores [L, E], counts [L, E], accepted [L, E]) -> [L, E], after the step. accepted: choices of the
        positions whose tokens were committed.
    resting: replaces `scores` while the adaptive draft length is 0; None: the same. name: in the figures.
    """

    scores: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    update: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    resting: Callable[[np.ndarray, np.ndarray, int], np.ndarray] | None = None
    name: str = "custom"


class Setting(NamedTuple):
    """What a policy is made for: layers with experts, experts per layer, and whether the draft length is adaptive."""

    num_layers: int
    num_experts: int
    guard: bool = False


def hot_temporal(setting: Setting) -> DraftSetPolicy:
    """SpecMoE's: the latest pass alone counts, so the chosen were just fetched and the switch moves nothing.

    While the adaptive draft length is 0, a pass has one token per row, a poor sample, so all passes count as in hot_global.
    """
    if setting.guard:
        everything = hot_global(setting)
        return everything._replace(scores=_counts, resting=everything.scores, name="hot_temporal")
    return DraftSetPolicy(_counts, update=lambda usage_scores, counts, accepted: np.zeros_like(usage_scores), name="hot_temporal")


def _counts(usage_scores: np.ndarray, counts: np.ndarray, layer: int) -> np.ndarray:
    return counts


def hot_global(setting: Setting) -> DraftSetPolicy:
    """SpecMoE's ablation: the most used over all. Deviation: counted while running, not profiled beforehand."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: usage_scores + counts,
        update=lambda usage_scores, counts, accepted: usage_scores + counts,
        name="hot_global",
    )


def decayed(setting: Setting) -> DraftSetPolicy:
    """Ours: between the two, older passes fade by DECAY a step."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: DECAY * usage_scores + counts,
        update=lambda usage_scores, counts, accepted: DECAY * usage_scores + counts,
        name="decay",
    )


def accepted_only(setting: Setting) -> DraftSetPolicy:
    """Ours: only committed positions count, known after the pass, so the set lags by a step and may have to move."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: usage_scores,
        update=lambda usage_scores, counts, accepted: accepted.astype(usage_scores.dtype),
        name="accepted",
    )


def random_set(setting: Setting) -> DraftSetPolicy:
    """SpecMoE's ablation: a set drawn once."""
    fixed = np.random.default_rng(0).random((setting.num_layers, setting.num_experts))
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: fixed[layer],
        update=lambda usage_scores, counts, accepted: usage_scores,
        name="random",
    )


def make_policy(name: str, num_layers: int, num_experts: int, *, guard: bool = False) -> DraftSetPolicy:
    """The policy of a plan's `draft_set`. guard: whether the draft length is adaptive."""
    return DRAFT_SETS.executor(name)(Setting(num_layers, num_experts, guard))


def keep_rule(
    policy: DraftSetPolicy, sizes: Sequence[int], homes: np.ndarray | None = None, devices: int = 1
) -> Callable[..., np.ndarray]:
    """(layer, usage scores [E], counts [E], resident [E], resting) -> [E] bool: the `sizes[layer]` best experts by the policy.

    homes: [L, E], of several devices the one of each expert; they keep equal shares.
    """

    def keep(layer: int, usage_scores: np.ndarray, counts: np.ndarray, resident: np.ndarray, resting: bool = False) -> np.ndarray:
        scores = policy.resting if resting and policy.resting else policy.scores
        ranked = scores(usage_scores, counts, layer)
        if homes is None:
            return hot_set(ranked, resident, sizes[layer])
        return shared_hot_set(ranked, resident, sizes[layer], homes[layer], devices)

    return keep
