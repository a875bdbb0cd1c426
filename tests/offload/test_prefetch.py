"""Plans of prefetches, and the emulated link's clock."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.offload.residency import Residency, empty, plan_layer, plan_prefetch
from specmoe_jax.offload.store import Link

NONE = np.zeros(0, np.int32)


def consistent(residency: Residency) -> bool:
    """slot_of and owner are the same map, read from both ends."""
    layers, experts = np.nonzero(residency.slot_of >= 0)
    slots = residency.slot_of[layers, experts]
    named = residency.owner[slots] == layers * residency.slot_of.shape[1] + experts
    return bool(named.all()) and len(set(slots.tolist())) == len(slots) == int((residency.owner >= 0).sum())


@st.composite
def cases(draw):
    layers, experts, slots = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 20))
    predicted = np.array(draw(st.lists(st.integers(0, 3), min_size=layers * experts, max_size=layers * experts)))
    in_use = np.array(draw(st.lists(st.integers(-1, slots - 1), max_size=4)), np.int32)
    reserve, limit = draw(st.integers(0, slots)), draw(st.integers(0, 25))
    residency = empty(layers, experts, slots)
    for layer in range(layers):  # some residents to begin with
        keep = np.array(draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
        if keep.sum() <= (residency.owner < 0).sum():
            _, residency = plan_layer(residency, layer, np.zeros(experts, bool), keep)
    return residency, predicted.reshape(layers, experts), in_use, reserve, limit


@settings(max_examples=200, deadline=None)
@given(cases())
def test_prefetch_takes_only_free_slots_and_leaves_the_reserve(case):
    residency, predicted, in_use, reserve, limit = case
    before = residency._replace(slot_of=residency.slot_of.copy(), owner=residency.owner.copy())
    copies, after = plan_prefetch(residency, predicted, reserve=reserve, limit=limit, in_use=in_use)
    np.testing.assert_array_equal(residency.owner, before.owner)  # arguments are not changed
    np.testing.assert_array_equal(residency.slot_of, before.slot_of)
    free = np.flatnonzero(before.owner < 0)
    assert consistent(after)
    assert len(copies) <= limit
    assert not copies or len(free) - len(copies) >= reserve
    for layer, expert, slot in copies:
        assert predicted[layer, expert] > 0
        assert before.slot_of[layer, expert] < 0
        assert before.owner[slot] < 0
        assert slot not in in_use.tolist()  # freed by its plan, but about to be read
        assert after.slot_of[layer, expert] == slot
    assert [layer for layer, _, _ in copies] == sorted(layer for layer, _, _ in copies)
    usable = len(set(free.tolist()) - set(in_use.tolist()))
    wanted = int(((predicted > 0) & (before.slot_of < 0)).sum())
    assert len(copies) == max(0, min(limit, len(free) - reserve, usable, wanted))


def test_the_most_expected_experts_of_the_nearest_layer_come_first():
    predicted = np.array([[0, 1, 3], [9, 0, 0]])
    copies, _ = plan_prefetch(empty(2, 3, 5), predicted, reserve=2, limit=9, in_use=NONE)
    assert [(layer, expert) for layer, expert, _ in copies] == [(0, 2), (0, 1), (1, 0)]


def test_a_prefetched_expert_is_a_hit_and_freed_by_its_layer():
    copies, residency = plan_prefetch(empty(1, 3, 3), np.array([[0, 1, 1]]), reserve=0, limit=9, in_use=NONE)
    plan, residency = plan_layer(residency, 0, np.array([True, True, False]), np.zeros(3, bool))
    assert (plan.hits, plan.misses, len(copies)) == (1, 1, 2)
    assert (residency.owner < 0).all()


def test_link_arrivals_queue_and_the_oracle_starts_earlier():
    link, oracle = Link(1e6), Link(1e6, oracle=True)
    now = time.perf_counter()
    first, second = link.send(20_000), link.send(10_000)
    assert 0.02 <= first - now < 1.0  # the byte time, and whatever another process took of this one
    assert abs(second - first - 0.01) < 1e-6
    link.wait(second)
    assert time.perf_counter() >= second
    assert link.sent_bytes == 30_000
    oracle.wait(0.0)  # a computation starts here; what the next layer needs is sent after it but travels meanwhile
    time.sleep(0.02)
    assert oracle.send(20_000) - time.perf_counter() < 0.005
