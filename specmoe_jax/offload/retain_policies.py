"""Which retained expert is overwritten first: the policies of `retain`, which the planner's replay shares. Pure.

They rank by the same keys as those of a host cache; a new one is an object here and a line in config/registry.py.
"""

from typing import NamedTuple

import numpy as np

from specmoe_jax.offload.host_cache_policies import (
    HostCachePolicy,
    Usage,
    least_frequently_recently_used,
    least_recently_used,
    longest_expected_wait,
)


class RetainPolicy(NamedTuple):
    """keys: what is overwritten first has the smallest. by_history: they need more than the fading counts.

    by_draft: they need the experts that the draft's gates chose, so a draft that runs the target's gates.
    """

    keys: HostCachePolicy
    by_history: bool = True
    by_draft: bool = False


def fading_usage(usage: Usage) -> tuple[np.ndarray, ...]:
    """Choices, each pass counting less than the one after it."""
    assert usage.fading is not None
    return (usage.fading,)


def drafted_first(policy: HostCachePolicy) -> HostCachePolicy:
    """What the draft says that this pass will still need stays; of the others, and among them, as the policy says."""

    def keys(usage: Usage) -> tuple[np.ndarray, ...]:
        assert usage.drafted is not None
        return (*policy(usage), usage.drafted > 0)

    return keys


USAGE = RetainPolicy(fading_usage, by_history=False)
LRU = RetainPolicy(least_recently_used)
LFRU = RetainPolicy(least_frequently_recently_used)
EXPECTED = RetainPolicy(longest_expected_wait)
DRAFTED = RetainPolicy(drafted_first(fading_usage), by_history=False, by_draft=True)
