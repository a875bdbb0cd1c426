"""Measures of how unevenly something is spread."""

import numpy as np
import pytest

from specmoe_jax.support.statistics import gini


def test_gini_of_known_counts():
    assert gini(np.ones(8)) == pytest.approx(0)
    assert gini(np.eye(8)[0]) == pytest.approx(7 / 8)
    assert gini([3, 1]) == pytest.approx(0.25)
    assert gini(np.zeros(4)) == 0


def test_gini_is_taken_along_the_last_axis():
    np.testing.assert_allclose(gini(np.array([[1, 1], [0, 2]])), [0, 0.5])
