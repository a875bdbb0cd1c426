"""Sums over steps: bounded, and equal to what is counted the long way."""

import types

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.engine import figures as metrics
from specmoe_jax.support.timing import CompileCounter

LAYERS, EXPERTS, CHOICES, WIDTH = 2, 5, 2, 4


def a_step(rng, start, active):
    """Random routing of a pass of WIDTH positions; every active row commits 1 to WIDTH of them."""
    rows = len(start)
    return types.SimpleNamespace(
        verify=types.SimpleNamespace(routing=rng.integers(0, EXPERTS, (LAYERS, rows, WIDTH, CHOICES))),
        active=active,
        start=start,
        committed=np.where(active, rng.integers(1, WIDTH + 1, rows), 0),
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limits=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_on_demand_is_counted_exactly_in_a_window(seed, limits):
    rng, limits = np.random.default_rng(seed), np.array(limits)
    start = np.zeros(len(limits), int)
    counted, needed = metrics.no_on_demand(LAYERS, EXPERTS), np.zeros((100, LAYERS, EXPERTS), bool)
    while (active := start < limits).any():
        info = a_step(rng, start, active)
        counted = metrics.add_on_demand(counted, info)
        for row in np.flatnonzero(active):
            for offset in range(info.committed[row]):
                for layer in range(LAYERS):
                    needed[start[row] + offset, layer, info.verify.routing[layer, row, offset]] = True
        ends = start + info.committed
        furthest = max(ends.max(), counted.first)
        assert len(counted.needed) <= furthest - start[active].min()
        start = ends
    np.testing.assert_array_equal(counted.experts, needed.sum(axis=(0, 2)))


def test_one_listener_counts_for_all():
    first = CompileCounter()
    before = len(jax._src.monitoring.get_event_duration_listeners())
    second = CompileCounter()
    assert len(jax._src.monitoring.get_event_duration_listeners()) == before
    jax.jit(lambda x: x * 3.25 + 1)(np.float32(before))
    assert first.count >= 1 and second.count == first.count and second.seconds == first.seconds > 0
    assert CompileCounter().count == 0
