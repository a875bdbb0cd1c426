"""Which absent experts the host computes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specmoe_jax.offload.host_share import MOST_CHOICES, computed_on_host


def test_those_that_fewest_tokens_chose():
    absent = np.array([True, False, True, True, True])
    assert computed_on_host(absent, np.array([5, 1, 2, 7, 2]), 0.5).tolist() == [False, False, True, False, True]


def test_an_expert_of_many_tokens_crosses_the_link():
    choices = np.array([MOST_CHOICES, MOST_CHOICES + 1])
    assert computed_on_host(np.ones(2, bool), choices, 1.0).tolist() == [True, False]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), min_size=1, max_size=40), st.floats(0, 1))
def test_of_the_absent_ones_at_most_the_share(experts, share):
    absent, choices = np.array([a for a, _ in experts]), np.array([c for _, c in experts])
    chosen = computed_on_host(absent, choices, share)
    allowed = absent & (choices <= MOST_CHOICES)
    assert not (chosen & ~allowed).any()
    assert chosen.sum() == min(int(share * absent.sum() + 0.5), allowed.sum())
    assert not chosen.any() or not (allowed & ~chosen).any() or choices[chosen].max() <= choices[allowed & ~chosen].min()
