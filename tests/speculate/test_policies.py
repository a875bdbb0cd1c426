"""The draft-set policies: which experts each would keep, in integers."""

import numpy as np
import pytest

from specmoe_jax.speculate.hot_experts.policies import DECAY, make_policy
from specmoe_jax.speculate.hot_experts.usage import hot_set

FIRST, SECOND = np.array([[5, 0, 1]]), np.array([[0, 2, 1]])


def after_two_passes(name):
    """The scores of layer 0 while the second of two passes is verified; in each only expert 2 was accepted."""
    policy, usage_scores, accepted = make_policy(name, 1, 3), np.zeros((1, 3)), np.array([[0, 0, 1]])
    usage_scores = policy.update(usage_scores, FIRST, accepted)
    return policy.scores(usage_scores[0], SECOND[0], 0), policy.update(usage_scores, SECOND, accepted)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("hot_temporal", [0, 2, 1]),
        ("hot_global", [5, 2, 2]),
        ("decay", [5 * DECAY, 2, 1 + DECAY]),
        ("accepted", [0, 0, 1]),
    ],
)
def test_scores(name, scores):
    np.testing.assert_allclose(after_two_passes(name)[0], scores)


def test_random_set_never_moves_and_differs_by_layer():
    policy = make_policy("random", 2, 64)
    before = policy.scores(np.zeros(64), np.zeros(64), 0)
    np.testing.assert_array_equal(before, policy.scores(np.ones(64), np.arange(64), 0))
    sets = [hot_set(policy.scores(np.zeros(64), np.zeros(64), layer), np.zeros(64, bool), 8) for layer in (0, 1)]
    assert (sets[0] != sets[1]).any()


def test_temporal_forgets_global_does_not():
    assert not after_two_passes("hot_temporal")[1].any()
    np.testing.assert_array_equal(after_two_passes("hot_global")[1], FIRST + SECOND)


def test_under_a_guard_temporal_remembers_for_when_it_rests():
    policy, usage_scores = make_policy("hot_temporal", 1, 3, guard=True), np.zeros((1, 3))
    usage_scores = policy.update(usage_scores, FIRST, FIRST)
    np.testing.assert_array_equal(policy.scores(usage_scores[0], SECOND[0], 0), SECOND[0])
    np.testing.assert_array_equal(policy.resting(usage_scores[0], SECOND[0], 0), FIRST[0] + SECOND[0])
    assert make_policy("hot_temporal", 1, 3).resting is None
