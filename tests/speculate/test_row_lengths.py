"""Rows end their drafts by what their experts cost: small cases by hand, and properties of any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from specmoe_jax.speculate.row_lengths import FADE, PRIOR, PRIOR_WEIGHT, UNION, chances

NOTHING_HELD = np.zeros((1, 8), bool)


def choices(*rows):
    """One layer: of each row the expert at each position."""
    return np.array(rows, np.int32).T[:, None, :, None]


def certain(rows, length):
    """A record in which everything was accepted often."""
    record = UNION.begin(rows, length)
    for _ in range(300):
        record = UNION.observe(record, *(np.full(rows, length),) * 2, np.full(rows, True), np.arange(rows))
    return record


def test_a_row_goes_on_with_experts_that_others_need_anyway():
    """Of two rows that bring an expert of their own at each position, against one that stays with the other's."""
    lengths = UNION.lengths(UNION.begin(2, 4), choices([0, 1, 2, 3], [0, 0, 0, 0]), np.array([True, True]), NOTHING_HELD)
    assert lengths[1] == 4 > lengths[0]


def test_what_is_held_costs_nothing():
    held = NOTHING_HELD.copy()
    held[0, :4] = True
    record = UNION.begin(1, 4)
    assert UNION.lengths(record, choices([0, 1, 2, 3]), np.array([True]), held) == [4]
    assert UNION.lengths(record, choices([4, 5, 6, 7]), np.array([True]), held) < [4]


def test_experts_that_several_rows_bring_are_shared():
    """Alone a row would not pay for them."""
    texts = [[0, 1, 2, 3]] * 6
    alone = UNION.lengths(UNION.begin(1, 4), choices(*texts[:1]), np.array([True]), NOTHING_HELD)
    together = UNION.lengths(UNION.begin(6, 4), choices(*texts), np.full(6, True), NOTHING_HELD)
    assert (together == together[0]).all() and together[0] >= alone[0]


def test_rows_that_are_accepted_go_further():
    """Of two alike rows, of which one is never accepted."""
    record, active = UNION.begin(2, 3), np.array([True, True])
    for _ in range(20):
        record = UNION.observe(record, np.array([3, 3]), np.array([3, 0]), active, np.array([5, 6]))
    good, bad = chances(record)
    assert good[0] > bad[0] and (good >= bad).all()
    lengths = UNION.lengths(record, choices([0, 1, 2], [3, 4, 5]), active, NOTHING_HELD)
    assert lengths[0] > lengths[1]
    fresh = UNION.observe(record, np.array([3, 3]), np.array([3, 3]), active, np.array([5, 7]))  # row 1 serves another request
    assert (fresh.row_tried[1] == 1).all() and (fresh.row_accepted[1] == 1).all() and (fresh.row_tried[0] > 1).all()


def test_the_record_by_hand():
    record = UNION.observe(UNION.begin(2, 3), np.array([3, 1]), np.array([1, 1]), np.array([True, True]), np.array([0, 1]))
    assert record.tried.tolist() == [2, 1, 0] and record.accepted.tolist() == [2, 0, 0]
    again = UNION.observe(record, np.array([0, 2]), np.array([0, 0]), np.array([False, True]), np.array([0, 1]))
    np.testing.assert_allclose(again.tried, [2 * FADE + 1, FADE, 0])
    np.testing.assert_allclose(again.row_tried, [[FADE, FADE, 0], [FADE + 1, 0, 0]])
    assert chances(UNION.begin(2, 3)) == pytest.approx(np.full((2, 3), PRIOR)) and PRIOR_WEIGHT > 0


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_batch(data):
    """Lengths are in range, idle rows get none, and what costs nothing is all verified if it is likely."""
    length, layers, rows, top = (data.draw(st.integers(1, most)) for most in (4, 3, 5, 2))
    ids = data.draw(arrays.arrays(np.int32, (length, layers, rows, top), elements=st.integers(0, 5)))
    active = data.draw(arrays.arrays(bool, rows))
    ids = np.where(active[None, None, :, None], ids, -1)
    held = data.draw(arrays.arrays(bool, (layers, 6)))
    before = held.copy()
    lengths = UNION.lengths(UNION.begin(rows, length), ids, active, held)
    assert (held == before).all() and lengths.dtype == np.int32
    assert (lengths[~active] == 0).all() and (0 <= lengths).all() and (lengths <= length).all()
    assert (UNION.lengths(certain(rows, length), ids, active, np.ones((layers, 6), bool))[active] == length).all()
