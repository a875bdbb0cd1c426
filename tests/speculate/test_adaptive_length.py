"""The guard as a pure function: it is fed made-up machines and must find their best draft length."""

import numpy as np
import pytest

from specmoe_jax.speculate.adaptive_length import acceptance, best_length, choose, make_adaptive_length, observe, resting


def drive(guard, rate, step_s, steps, seed=0):
    """Runs a machine with per-token acceptance `rate` and `step_s(length)` seconds; -> guard, tokens, seconds, lengths."""
    rng = np.random.default_rng(seed)
    tokens, seconds, lengths = 0.0, 0.0, []
    for _ in range(steps):
        length = choose(guard)
        runs = np.array([np.argmin(np.append(rng.random(length) < rate, False)) for _ in range(8)])
        took = step_s(length)
        guard = observe(guard, length, runs, took)
        tokens, seconds = tokens + runs.mean() + 1, seconds + took
        lengths.append(length)
    return guard, tokens, seconds, lengths


def test_lengths_are_the_compiled_buckets():
    assert make_adaptive_length(1).lengths == (0, 1)
    assert make_adaptive_length(4).lengths == (0, 1, 2, 4)
    assert make_adaptive_length(10).lengths == (0, 1, 2, 4, 8, 10)


@pytest.mark.parametrize("cost", [0.3, 1.0])
def test_useless_drafts_cost_at_most_three_percent(cost):
    _, tokens, seconds, _ = drive(make_adaptive_length(4), 0.0, lambda length: 1 + cost * length, 400)
    assert tokens / seconds >= 0.97  # plain decoding makes one token a second


def test_perfect_cheap_drafts_are_used_in_full():
    _, tokens, seconds, lengths = drive(make_adaptive_length(8), 1.0, lambda length: 1 + 0.05 * length, 200)
    assert np.mean(np.array(lengths) == 8) > 0.9
    assert tokens / seconds > 0.95 * 9 / 1.4


def test_medium_acceptance_finds_a_medium_length():
    rate, cost = 0.6, 0.25
    best = max((0, 1, 2, 4, 8), key=lambda k: (1 - rate ** (k + 1)) / (1 - rate) / (1 + cost * k))
    _, _, _, lengths = drive(make_adaptive_length(8), rate, lambda length: 1 + cost * length, 400)
    values, counts = np.unique(lengths[100:], return_counts=True)
    assert values[counts.argmax()] == best == 2


def test_speculation_returns_when_acceptance_does():
    guard, *_ = drive(make_adaptive_length(4), 0.0, lambda length: 1 + 0.3 * length, 100)
    assert choose(guard) == 0
    _, _, _, lengths = drive(guard, 0.95, lambda length: 1 + 0.3 * length, 300)
    assert np.mean(np.array(lengths[-100:]) == 4) > 0.8


def test_acceptance_is_per_tried_token():
    guard = observe(make_adaptive_length(4), 4, np.array([4, 2]), 1.0)  # 4 + 2 stood, one fell
    assert acceptance(guard) == pytest.approx(6 / 7)
    assert acceptance(observe(guard, 0, np.zeros(2), 1.0)) == acceptance(guard)


def cold(step_s, factor=10.0, warms=2):
    """A machine on which the first `warms` steps of a length after others take `factor` times as long."""
    runs = {"length": None, "count": 0}

    def seconds(length):
        runs["count"] = runs["count"] + 1 if runs["length"] == length else 0
        runs["length"] = length
        return step_s(length) * (factor if length and runs["count"] < warms - 1 else 1)

    return seconds


def test_a_cold_start_does_not_end_the_drafting():
    """The longest draft is slow while its experts are not there; it is tried again, and for two steps."""
    _, tokens, seconds, lengths = drive(make_adaptive_length(10), 0.9, cold(lambda length: 1 + 0.1 * length), 300)
    assert np.mean(np.array(lengths[60:]) >= 8) > 0.8
    assert tokens / seconds > 0.85 * (1 - 0.9**11) / 0.1 / 2


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("cost", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("longest", [1, 4, 10])
def test_never_three_percent_slower_than_none(rate, cost, longest):
    """After the first two steps, which measure, whatever the machine."""
    _, tokens, seconds, _ = drive(make_adaptive_length(longest), rate, lambda length: 1 + cost * length, 3000)
    first = 1 + cost * longest
    assert tokens / (seconds - first) >= 0.97


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rate, cost", [(0.2, 0.1), (0.4, 1.0), (0.6, 0.6), (0.8, 1.0)])
def test_noise_and_a_plain_step_that_drafting_spoiled_hardly_mislead(rows, rate, cost):
    """Steps of a few rows vary, and for two steps after a draft plain decoding lacks its experts: 600 steps from the first on."""
    speeds = []
    for seed in range(4):
        rng, guard, plain = np.random.default_rng(seed), make_adaptive_length(4), 0
        tokens = seconds = 0.0
        for _ in range(600):
            length = choose(guard)
            plain = plain + 1 if length == 0 else 0
            runs = np.array([np.argmin(np.append(rng.random(length) < rate, False)) for _ in range(rows)])
            noise = rng.lognormal(-(0.35**2) / rows / 2, 0.35 / np.sqrt(rows))
            took = (1 + cost * length) * noise * (1.3 if plain in (1, 2) else 1)
            guard = observe(guard, length, runs, took)
            tokens, seconds = tokens + runs.mean() + 1, seconds + took
        speeds.append(tokens / seconds)
    assert np.mean(speeds) >= 0.955


@pytest.mark.parametrize("rate, cost", [(0.0, 0.5), (0.9, 0.05), (0.5, 0.4), (0.2, 1.0)])
@pytest.mark.parametrize("first", [100, 108, 124])
def test_one_slow_step_changes_nothing_for_long(rate, cost, first):
    """A neighbour's hiccup of 30 steps, three times: of the time beside it, hardly anything is lost."""
    took, step_s = [], lambda length: 1 + cost * length

    def shaken(length):
        took.append(step_s(length))
        return took[-1] * (30 if len(took) in (first, first + 100, first + 160) else 1)

    _, steady_tokens, steady_s, _ = drive(make_adaptive_length(8), rate, step_s, 400)
    _, shaken_tokens, _, _ = drive(make_adaptive_length(8), rate, shaken, 400)
    assert shaken_tokens / sum(took) >= 0.93 * steady_tokens / steady_s


def test_rests_while_nothing_is_drafted_and_in_trials_out_of_it():
    guard = make_adaptive_length(4)
    assert not resting(guard, 4) and resting(guard, 0)
    guard, _, _, lengths = drive(guard, 0.0, lambda length: 1 + length, 60)
    assert any(lengths[2:]) and best_length(guard) == 0  # there were trials
    assert resting(guard, 0) and resting(guard, 1)
    guard, *_ = drive(make_adaptive_length(4), 1.0, lambda length: 1 + 0.1 * length, 60)
    assert resting(guard, 0) and not resting(guard, 4)
