"""Substitution while drafting, against the rules written out for one token at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.models import layers
from specmoe_jax.models.routing import route
from specmoe_jax.speculate.hot_experts.substitution import (
    MaskedSlots,
    best_choices,
    choose_distinct,
    draft_slots,
    random_neighbours,
)
from specmoe_jax.testing import TINY, tiny
from specmoe_jax.types import Routing

L, E = 2, 6
LAYER = TINY.layers[0]


def plan(**changes):
    return sm.PRESETS["specmoe"](TINY).replace(**changes)


@st.composite
def residents(draw):
    """[L, E] slots of N residents a layer, N."""
    size = draw(st.integers(1, E))
    slot_of = np.full((L, E), -1, np.int32)
    for layer in range(L):
        experts = draw(st.permutations(range(E)))[:size]
        slot_of[layer, experts] = np.arange(size) + layer * E
    return slot_of, size


def one_by_one(ids, own, order):
    """The rule for one token. order: [E, E] neighbours."""
    taken = {own[e] for e in ids if own[e] >= 0}
    chosen = []
    for expert in ids:
        by_distance = [own[e] for e in order[expert] if own[e] >= 0]
        slot = own[expert]
        if slot < 0:
            slot = next((s for s in by_distance if s not in taken), by_distance[0])
            taken.add(slot)
        chosen.append(slot)
    return chosen


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(residents(), st.lists(st.permutations(range(E)), min_size=3, max_size=3), st.integers(0, 5))
def test_distinct(resident, choices, seed):
    slot_of, size = resident
    order = random_neighbours(L, E, seed)
    tables = draft_slots(slot_of, order, plan(substitution="distinct", draft_experts=size))
    ids = np.array(choices)[:, :3]
    ids[1] = -1  # padding
    for layer in range(L):
        chosen = np.asarray(choose_distinct(jnp.asarray(ids), tables[layer]))
        assert (chosen[1] == -1).all()
        for token in (0, 2):
            assert chosen[token].tolist() == one_by_one(ids[token].tolist(), slot_of[layer], order[layer])
            if size >= 3:
                assert len(set(chosen[token].tolist())) == 3


@settings(deadline=None, max_examples=20)
@given(residents(), st.integers(0, 5))
def test_affinity_takes_the_nearest(resident, seed):
    slot_of, size = resident
    order = random_neighbours(L, E, seed)
    tables = draft_slots(slot_of, order, plan(draft_experts=size))
    for layer in range(L):
        for expert in range(E):
            assert tables[layer][expert] == next(slot_of[layer, e] for e in order[layer, expert] if slot_of[layer, e] >= 0)


def test_mask_chooses_among_residents_and_renormalises():
    x = np.random.default_rng(0).standard_normal((7, TINY.hidden_size)).astype(np.float32)
    weights, valid = tiny().weights.layers[1], np.arange(7) != 3
    routing = route(LAYER.router, x, weights.router, None, valid)
    allowed = np.array([True, False, True, False, True])
    masked = layers.reroute(LAYER, weights, x, routing, allowed)
    logits = np.where(allowed, x @ np.asarray(weights.router).T, -np.inf)
    for token in np.flatnonzero(valid):
        best = np.argsort(-logits[token])[: TINY.experts_per_token]
        assert masked.ids[token].tolist() == best.tolist()
        shares = np.exp(logits[token, best]) / np.exp(logits[token, best]).sum()
        np.testing.assert_allclose(masked.weights[token], shares, rtol=1e-5)
    assert (masked.ids[3] == -1).all() and not masked.weights[3].any()


def test_mask_with_fewer_residents_than_choices():
    x = np.random.default_rng(0).standard_normal((4, TINY.hidden_size)).astype(np.float32)
    weights = tiny().weights.layers[0]
    routing = route(LAYER.router, x, weights.router, None, np.ones(4, bool))
    masked = layers.reroute(LAYER, weights, x, routing, np.arange(TINY.num_experts) == 2)
    assert (masked.ids[:, 0] == 2).all()
    np.testing.assert_array_equal(masked.weights, np.tile([1.0, 0.0], (4, 1)))


def test_mask_needs_no_neighbours():
    slot_of = np.array([[0, -1, 1]], np.int32)
    (slots,) = draft_slots(slot_of, None, plan(substitution="mask"))
    assert isinstance(slots, MaskedSlots) and slots.own.tolist() == [0, -1, 1]


def test_distinct_without_effect():
    with pytest.raises(sm.PlanError, match="distinct has no effect"):
        plan(substitution="distinct").validate(dataclasses.replace(TINY, experts_per_token=1))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_fewer_choices_are_residents_first_and_keep_what_the_token_gave(data):
    """Against the rule for one token at a time; padding stays padding."""
    chosen, top_k = data.draw(st.integers(1, E)), data.draw(st.integers(1, E))
    own = np.array(data.draw(st.lists(st.integers(-1, 5), min_size=E, max_size=E)), np.int32)
    ids = np.array([data.draw(st.permutations(range(E)))[:chosen], [-1] * chosen], np.int32)
    weights = np.stack([np.linspace(1, 0.1, chosen), np.zeros(chosen)]).astype(np.float32)
    found = best_choices(Routing(jnp.asarray(ids), jnp.asarray(weights)), own, top_k)
    ranked = sorted(range(chosen), key=lambda place: (own[ids[0, place]] < 0, place))[:top_k]
    assert found.ids[0].tolist() == [ids[0, place] for place in ranked]
    kept = weights[0, ranked]
    np.testing.assert_allclose(found.weights[0], kept * weights[0].sum() / kept.sum(), rtol=1e-5)
    assert (np.asarray(found.ids[1]) == -1).all() and (np.asarray(found.weights[1]) == 0).all()
