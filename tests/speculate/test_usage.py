import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specmoe_jax.speculate.hot_experts.usage import count_choices, hot_set, shared_hot_set

E = 7


@given(hnp.arrays(np.int32, st.tuples(st.integers(0, 12), st.integers(1, 3)), elements=st.integers(-1, E - 1)))
def test_count_choices_counts(ids):
    counts = count_choices(ids, E)
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((ids == e).sum()) for e in range(E)]


def test_an_id_beyond_the_experts_is_refused():
    with pytest.raises(ValueError, match="expert id 7 was chosen; there are 7 experts"):
        count_choices(np.array([[7]]), E)


COUNTS = hnp.arrays(np.int64, E, elements=st.integers(0, 3))
RESIDENT = hnp.arrays(bool, E)


@given(COUNTS, RESIDENT, st.integers(0, E))
def test_the_hot_set_is_the_best_of_its_size(counts, resident, size):
    hot = hot_set(counts, resident, size)
    assert hot.sum() == size
    rank = [(-counts[e], not resident[e], e) for e in range(E)]
    assert all(rank[inside] < rank[outside] for inside in np.flatnonzero(hot) for outside in np.flatnonzero(~hot))


@given(COUNTS, RESIDENT)
def test_a_refresh_moves_nothing_beyond_what_the_pass_fetched(counts, resident):
    hot = hot_set(counts, resident, int(resident.sum()))
    assert (resident | (counts > 0))[hot].all()


@given(RESIDENT)
def test_a_pass_without_votes_changes_nothing(resident):
    np.testing.assert_array_equal(hot_set(np.zeros(E, np.int64), resident, int(resident.sum())), resident)


@given(COUNTS, RESIDENT, st.integers(0, E), st.integers(1, E))
def test_a_shared_set_is_the_best_of_equal_shares(counts, resident, size, devices):
    """What is outside is worse than all inside, or than its device's share."""
    homes, share = np.arange(E) % devices, -(-size // devices)
    hot = shared_hot_set(counts, resident, size, homes, devices)
    assert hot.sum() == size and np.bincount(homes[hot], minlength=devices).max() <= share
    rank = [(-counts[e], not resident[e], e) for e in range(E)]
    for outside in np.flatnonzero(~hot):
        worse = [inside for inside in np.flatnonzero(hot) if rank[inside] < rank[outside]]
        assert len(worse) == size or sum(homes[inside] == homes[outside] for inside in worse) == share
    if devices == 1:
        np.testing.assert_array_equal(hot, hot_set(counts, resident, size))


@given(COUNTS, COUNTS, st.integers(0, E), st.integers(1, E))
def test_a_refresh_of_a_shared_set_moves_nothing_either(before, counts, size, devices):
    """From one such set to the next."""
    homes = np.arange(E) % devices
    resident = shared_hot_set(before, np.zeros(E, bool), size, homes, devices)
    assert (resident | (counts > 0))[shared_hot_set(counts, resident, size, homes, devices)].all()


def test_a_set_larger_than_the_layer_is_refused():
    with pytest.raises(ValueError, match="8 experts; there are 7"):
        hot_set(np.zeros(E, np.int64), np.zeros(E, bool), 8)
