"""The guard as a pure function: it is fed made-up machines and must find their best draft length."""

import numpy as np
import pytest

from specmoe_jax.speculate.guard import acceptance, choose, make_guard, observe


def drive(guard, rate, step_s, steps, seed=0):
    """Runs a machine with per-token acceptance `rate` and `step_s(length)` seconds; -> guard, tokens, seconds, lengths."""
    rng = np.random.default_rng(seed)
    tokens, seconds, lengths = 0.0, 0.0, []
    for _ in range(steps):
        length = choose(guard)
        runs = np.array([np.argmin(np.append(rng.random(length) < rate, False)) for _ in range(8)])
        guard = observe(guard, length, runs, step_s(length))
        tokens, seconds = tokens + runs.mean() + 1, seconds + step_s(length)
        lengths.append(length)
    return guard, tokens, seconds, lengths


def test_lengths_are_the_compiled_buckets():
    assert make_guard(1).lengths == (0, 1)
    assert make_guard(4).lengths == (0, 1, 2, 4)
    assert make_guard(10).lengths == (0, 1, 2, 4, 8, 10)


@pytest.mark.parametrize("cost", [0.3, 1.0])
def test_useless_drafts_cost_at_most_three_percent(cost):
    _, tokens, seconds, _ = drive(make_guard(4), 0.0, lambda length: 1 + cost * length, 400)
    assert tokens / seconds >= 0.97  # plain decoding makes one token a second


def test_perfect_cheap_drafts_are_used_in_full():
    _, tokens, seconds, lengths = drive(make_guard(8), 1.0, lambda length: 1 + 0.05 * length, 200)
    assert np.mean(np.array(lengths) == 8) > 0.9
    assert tokens / seconds > 0.95 * 9 / 1.4


def test_medium_acceptance_finds_a_medium_length():
    rate, cost = 0.6, 0.25
    best = max((0, 1, 2, 4, 8), key=lambda k: (1 - rate ** (k + 1)) / (1 - rate) / (1 + cost * k))
    _, _, _, lengths = drive(make_guard(8), rate, lambda length: 1 + cost * length, 400)
    values, counts = np.unique(lengths[100:], return_counts=True)
    assert values[counts.argmax()] == best == 2


def test_speculation_returns_when_acceptance_does():
    guard, *_ = drive(make_guard(4), 0.0, lambda length: 1 + 0.3 * length, 100)
    assert choose(guard) == 0
    _, _, _, lengths = drive(guard, 0.95, lambda length: 1 + 0.3 * length, 300)
    assert lengths[-1] == 4


def test_acceptance_is_per_tried_token():
    guard = observe(make_guard(4), 4, np.array([4, 2]), 1.0)  # 4 + 2 stood, one fell
    assert acceptance(guard) == pytest.approx(6 / 7)
    assert acceptance(observe(guard, 0, np.zeros(2), 1.0)) == acceptance(guard)
