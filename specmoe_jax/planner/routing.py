"""How many different experts some tokens need: a model of the routing with one number, its skew. Pure.

Skew is the Gini coefficient of the expert counts over many tokens (SpecMoE's "hotness skewness"). Popularity is log-normal over the
experts of a layer, and tokens choose independently of each other.
Deviation from a real router: the tokens of one text keep to fewer experts than independent ones of the same skew (so a batch of
few rows needs fewer than said here), and no trained router's tail is exactly log-normal.
"""

import functools
import math
import statistics

import numpy as np

from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.statistics import gini

ASSUMED_SKEW = 0.4  # where nothing was measured; the papers' models: NLLB-MoE 0.84, Mixtral 0.32, Scout 0.59
ASSUMED_SHARE = 0.6  # of the highest possible skew at most: where a token takes most of the experts, counts can hardly differ


def assumed_skew(num_experts: int, per_token: int) -> float:
    """The assumed skew of an unknown router, at most what its top-k allows."""
    return min(ASSUMED_SKEW, ASSUMED_SHARE * highest_skew(num_experts, per_token))


def highest_skew(num_experts: int, per_token: int) -> float:
    """Where every token takes the same experts."""
    return 1 - per_token / num_experts


@functools.cache
def choice_probabilities(num_experts: int, per_token: int, skew: float) -> tuple[float, ...]:
    """[E], descending: the probability that a token chooses each expert; they sum to `per_token` and their Gini is `skew`.

    Raises PlanError for a skew that no choice of `per_token` different experts can have.
    """
    highest = highest_skew(num_experts, per_token)
    if not 0 <= skew <= highest:
        raise PlanError(f"skew is {skew}; {per_token} of {num_experts} experts a token allow 0 to {highest:.3f}")
    normal = statistics.NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / num_experts) for i in reversed(range(num_experts))])
    width = _bisect(lambda width: gini(_included(np.exp(width * quantiles), per_token)) - skew, 0.0, 50.0)
    return tuple(_included(np.exp(width * quantiles), per_token).tolist())


def distinct(probabilities: tuple[float, ...], tokens: float) -> float:
    """Different experts of a layer that `tokens` tokens need, expected."""
    return float(_used(probabilities, tokens).sum())


def missed(probabilities: tuple[float, ...], tokens: float, resident: float) -> float:
    """Those of them that are not among the `resident` most popular ones. A fraction of an expert counts as such."""
    used, whole = _used(probabilities, tokens), int(resident)
    return float(used[whole:].sum() - (resident - whole) * (used[whole] if whole < len(used) else 0.0))


def busiest(count: float, num_experts: int, devices: int, kept: int = 0) -> float:
    """Of `count` different experts of a layer, those of the device that has most of them, expected.

    Experts belong to devices whatever their popularity, so a device's are as many as of a random draw: mean and deviation of a
    hypergeometric distribution, whose largest of n is taken as that of n independent normal numbers. kept: others, which devices
    have equal shares of; all are taken to have as many that may be among the `count` as the one that has most.
    """
    if devices == 1 or count <= 0:
        return count
    own = -(-num_experts // devices) - kept // devices
    drawn, among = count * own * devices / (num_experts - kept), own * devices
    variance = drawn / devices * (1 - 1 / devices) * max(among - drawn, 0) / max(among - 1, 1)
    expected = drawn / devices + _largest_normal(devices) * math.sqrt(variance)
    return min(max(expected, 1.0), own, count)  # an expert is whole


@functools.cache
def _largest_normal(count: int) -> float:
    """The expected largest of so many independent standard normal numbers, by Blom's approximation."""
    return statistics.NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _used(probabilities: tuple[float, ...], tokens: float) -> np.ndarray:
    return 1 - (1 - np.minimum(np.asarray(probabilities), 1.0)) ** tokens


def _included(popularity: np.ndarray, per_token: int) -> np.ndarray:
    """[E] probabilities 1 - exp(-rate x popularity) that sum to `per_token` (a Poisson model of drawing without replacement)."""
    if per_token == len(popularity):
        return np.ones(len(popularity))
    share = popularity / popularity.max()
    rate = np.exp(_bisect(lambda log_rate: (1 - np.exp(-np.exp(log_rate) * share)).sum() - per_token, -60.0, 60.0))
    return 1 - np.exp(-rate * share)


def _bisect(rising, low: float, high: float) -> float:
    """Where a rising function is 0; the nearer end where it is not between them."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
