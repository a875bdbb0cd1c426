"""plan_layer and plan_prefetch, played on a pool of slots: no slot changes while a pass still refers to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.offload.homes import most_experts, whole_slots
from specmoe_jax.offload.residency import Residency, empty, plan_layer, plan_prefetch
from specmoe_jax.support.errors import PlanError

EXAMPLES = settings(max_examples=150, deadline=None)


class Pool:
    """What the accelerator's slots hold, by the copies alone: (layer, expert) or None."""

    def __init__(self, num_slots):
        self.holds = [None] * num_slots

    def copy(self, copies, forbidden):
        """Overwrites slots; none of those in `forbidden` and each at most once."""
        slots = [slot for _, _, slot in copies]
        assert len(set(slots)) == len(slots)
        assert not set(slots) & set(forbidden), "a slot was overwritten while the pass refers to it"
        for layer, expert, slot in copies:
            self.holds[slot] = (layer, expert)

    def check(self, residency: Residency):
        """Both tables agree with each other and with the slots."""
        slot_of, owner, homes, devices = residency
        num_experts = slot_of.shape[1]
        for layer, expert in np.argwhere(slot_of >= 0):
            assert owner[slot_of[layer, expert]] == layer * num_experts + expert
            assert self.holds[slot_of[layer, expert]] == (layer, expert)
            assert slot_of[layer, expert] // (len(owner) // devices) == homes[layer, expert], "it is on another device"
        assert (owner >= 0).sum() == (slot_of >= 0).sum()
        for slot in np.flatnonzero(owner >= 0):
            assert slot_of[divmod(int(owner[slot]), num_experts)] == slot


def play(pool, residency, layer, needed, keep, predicted=None, **prefetch):
    """One layer's pass on the pool, each rule checked wave by wave. -> plan, residency."""
    before = residency._replace(slot_of=residency.slot_of.copy(), owner=residency.owner.copy())
    plan, after = plan_layer(residency, layer, needed, keep)
    assert all(np.array_equal(a, b) for a, b in zip(residency, before, strict=True)), "the argument was changed"
    resident = before.slot_of[layer] >= 0
    others = {int(s) for l, row in enumerate(before.slot_of) if l != layer for s in row[row >= 0]}
    waiting = {int(before.slot_of[layer, e]) for e in np.flatnonzero(needed & resident)}
    kept = {int(before.slot_of[layer, e]) for e in np.flatnonzero(keep & resident)}
    computed, fetched = [], []
    for wave in plan.waves:
        pool.copy(wave.fetch, others | waiting | kept)
        assert all(copy[0] == layer for copy in wave.fetch)
        fetched += [expert for _, expert, _ in wave.fetch]
        kept |= {slot for _, expert, slot in wave.fetch if keep[expert]}
        if predicted is not None:
            copies, after = plan_prefetch(after, predicted, in_use=wave.slots, **prefetch)
            pool.copy(copies, others | kept | {int(s) for s in wave.slots[wave.slots >= 0]})
        for expert in np.flatnonzero(wave.slots >= 0):
            assert pool.holds[wave.slots[expert]] == (layer, expert)
            computed.append(int(expert))
            waiting.discard(int(before.slot_of[layer, expert]))
    assert sorted(computed) == np.flatnonzero(needed).tolist(), "each needed expert is computed once"
    assert sorted(fetched) == np.flatnonzero((needed | keep) & ~resident).tolist(), "each is fetched once"
    assert plan.fetched == len(fetched)
    assert (plan.hits, plan.misses) == ((needed & resident).sum(), (needed & ~resident).sum())
    assert ((after.slot_of[layer] >= 0) == keep).all()
    pool.check(after)
    return plan, after


def subset(draw, num_experts, most=None, exactly=None):
    """[E] bool with at most `most`, or `exactly` so many, members."""
    size = exactly if exactly is not None else draw(st.integers(0, num_experts if most is None else most))
    members = draw(st.permutations(range(num_experts)))[:size]
    return np.isin(np.arange(num_experts), members)


def any_homes(draw, layers, experts, devices):
    """[L, E], of any placement."""
    return np.array([[expert % devices for expert in draw(st.permutations(range(experts)))] for _ in range(layers)])


@EXAMPLES
@given(st.data())
def test_passes_over_layers_with_pinned_draft_experts(data):
    """As the engine does it: N experts of every layer stay, passes of any routing, drafts in between."""
    draw = data.draw
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    pinned, devices = draw(st.integers(0, experts)), draw(st.integers(1, min(4, experts)))
    own = most_experts(devices, experts)  # all pinned experts may belong to one device
    room = draw(st.integers(0 if pinned == experts else 1, own))
    slots = devices * (layers * min(pinned, own) + room)
    pool, residency = Pool(slots), empty(layers, experts, slots, devices, any_homes(draw, layers, experts, devices))
    for layer in range(layers):  # the first draft set
        _, residency = play(pool, residency, layer, np.zeros(experts, bool), subset(draw, experts, exactly=pinned))
    for _ in range(draw(st.integers(1, 4))):
        for layer in range(layers):
            keep = subset(draw, experts, exactly=pinned)
            plan, residency = play(pool, residency, layer, subset(draw, experts), keep)
            if room >= min(plan.fetched, own):
                assert len(plan.waves) == 1
        pool.check(residency)  # a draft reads every resident expert here
        assert (residency.owner >= 0).sum() == layers * pinned


@EXAMPLES
@given(st.data())
def test_any_keep_set_is_served_or_refused(data):
    """Keep sets of any size: refused only where they and one more expert do not fit beside the other layers'."""
    draw = data.draw
    layers, experts, slots = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 8))
    pool, residency = Pool(slots), empty(layers, experts, slots)
    for _ in range(draw(st.integers(1, 8))):
        layer = draw(st.integers(0, layers - 1))
        needed, keep = subset(draw, experts), subset(draw, experts)
        others = (np.delete(residency.slot_of, layer, axis=0) >= 0).sum()
        try:
            _, residency = play(pool, residency, layer, needed, keep)
        except PlanError as e:
            assert others + (needed | keep).sum() > slots
            assert "\n" not in str(e) and "device memory" in str(e)


@EXAMPLES
@given(st.data())
def test_prefetched_experts_and_waves(data):
    """Guesses go to spare slots only: every dispatch still fits at once and nothing in use is overwritten."""
    draw = data.draw
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    pinned, most, devices = draw(st.integers(0, experts)), draw(st.integers(1, experts)), draw(st.integers(1, min(4, experts)))
    own = most_experts(devices, experts)
    dispatch = min(most, own)
    slots = devices * (layers * min(pinned, own) + dispatch + draw(st.integers(0, 6)))
    pool, residency = Pool(slots), empty(layers, experts, slots, devices, any_homes(draw, layers, experts, devices))
    for layer in range(layers):
        _, residency = play(pool, residency, layer, np.zeros(experts, bool), subset(draw, experts, exactly=pinned))
    for _ in range(draw(st.integers(1, 3))):
        usage_scores = np.array([[draw(st.integers(0, 3)) for _ in range(experts)] for _ in range(layers)])
        limit = draw(st.integers(0, 10))
        copies, residency = plan_prefetch(residency, usage_scores, reserve=dispatch, limit=limit, in_use=np.zeros(0, np.int32))
        assert np.bincount([residency.homes[layer, expert] for layer, expert, _ in copies], minlength=1).max() <= limit
        assert all(usage_scores[layer, expert] > 0 for layer, expert, _ in copies)
        pool.copy(copies, [])
        pool.check(residency)
        for layer in range(layers):
            ahead = np.where(np.arange(layers)[:, None] > layer, usage_scores, 0)
            needed, keep = subset(draw, experts, most=most), subset(draw, experts, exactly=pinned)
            plan, residency = play(pool, residency, layer, needed, keep, ahead, reserve=dispatch, limit=limit)
            assert len(plan.waves) == 1


def test_capacity_of_one():
    """A single slot carries any dispatch, one expert a wave."""
    pool, residency, everything = Pool(1), empty(2, 5, 1), np.ones(5, bool)
    for layer in (0, 1, 0):
        plan, residency = play(pool, residency, layer, everything, ~everything)
        assert len(plan.waves) == plan.misses == plan.fetched == 5


def test_capacity_of_top_k():
    """As many slots as one token needs."""
    pool, residency, none = Pool(2), empty(3, 6, 2), np.zeros(6, bool)
    for layer, chosen in enumerate([(0, 5), (2, 3), (5, 1)]):
        plan, residency = play(pool, residency, layer, np.isin(np.arange(6), chosen), none)
        assert len(plan.waves) == 1
        assert plan.misses == 2
    plan, _ = play(pool, residency, 0, ~none, none)
    assert len(plan.waves) == 3


def test_all_misses_at_once():
    pool, residency, everything = Pool(8), empty(1, 8, 8), np.ones(8, bool)
    plan, residency = play(pool, residency, 0, everything, ~everything)
    assert (len(plan.waves), plan.hits, plan.misses) == (1, 0, 8)
    assert (residency.owner < 0).all()


def test_nothing_needed_moves_nothing():
    pool, residency, none = Pool(3), empty(2, 4, 3), np.zeros(4, bool)
    keep = np.isin(np.arange(4), (1, 2))
    _, residency = play(pool, residency, 0, none, keep)
    plan, after = play(pool, residency, 0, none, keep)
    assert (plan.fetched, len(plan.waves)) == (0, 1)
    assert (after.slot_of == residency.slot_of).all()


def test_pinned_slots_of_other_layers_are_not_touched():
    """A pool in which all but one slot are pinned: the one slot is used over and over."""
    pool, residency, everything = Pool(5), empty(2, 4, 5), np.ones(4, bool)
    for layer in (0, 1):
        _, residency = play(pool, residency, layer, ~everything, np.isin(np.arange(4), (0, 1)))
    plan, residency = play(pool, residency, 0, everything, np.isin(np.arange(4), (2, 3)))
    assert (plan.hits, len(plan.waves)) == (2, 2)
    assert [pool.holds[slot] for slot in residency.slot_of[1, :2]] == [(1, 0), (1, 1)]


def test_a_full_pool_is_refused_with_what_to_do():
    residency, everything = empty(2, 3, 3), np.ones(3, bool)
    _, residency = plan_layer(residency, 0, everything, everything)
    with pytest.raises(PlanError, match="no free slot of 3; give more device memory"):
        plan_layer(residency, 1, everything, ~everything)


@pytest.mark.parametrize(("layers", "devices", "experts"), [(3, 4, 5), (2, 1, 4), (1, 3, 3)])
def test_all_experts_have_the_slots_of_a_plan_that_keeps_them(layers, devices, experts):
    slots, everything = layers * devices * most_experts(devices, experts), np.ones(experts, bool)
    residency = empty(layers, experts, slots, devices)
    for layer in range(layers):
        _, residency = plan_layer(residency, layer, ~everything, everything)
    assert (whole_slots(layers, devices, experts) == residency.slot_of).all()
