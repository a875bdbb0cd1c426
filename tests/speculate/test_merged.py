"""Groups of experts and their means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specmoe_jax.speculate.drafts.merged import Groups, group_experts, merge
from specmoe_jax.speculate.hot_experts.substitution import random_neighbours
from specmoe_jax.testing.oracles import expert_block

E = 6
ORDER = random_neighbours(1, E)[0]


@given(hnp.arrays(np.int64, E, elements=st.integers(0, 9)), st.integers(1, E))
def test_every_expert_is_in_one_group_with_its_nearest_centre(counts, size):
    groups = group_experts(counts, ORDER, size)
    assert set(groups.of.tolist()) == set(range(size))
    np.testing.assert_allclose(np.bincount(groups.of, groups.weights), np.ones(size))
    centres = sorted(sorted(range(E), key=lambda e: (-counts[e], e))[:size])
    for expert in range(E):
        nearest = next(e for e in ORDER[expert] if e in centres)
        assert groups.of[expert] == centres.index(nearest)
    for group in range(size):
        members = np.flatnonzero(groups.of == group)
        np.testing.assert_allclose(groups.weights[members], (counts[members] + 1) / (counts[members] + 1).sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_block_is_the_weighted_mean(dtype):
    rng = np.random.default_rng(0)
    matrices = [[rng.standard_normal(shape, np.float32) for shape in ((4, 8), (4, 8), (8, 4))] for _ in range(E)]
    blocks = [expert_block(*m, dtype) for m in matrices]
    groups = Groups(of=np.array([0, 1, 0, 1, 1, 0]), weights=np.array([0.2, 0.5, 0.3, 0.25, 0.25, 0.5]))
    expected = sum(w * expert_block(*m, "float32") for w, m in zip([0.2, 0.3, 0.5], [matrices[i] for i in (0, 2, 5)], strict=True))
    merged = merge(lambda e: blocks[e], groups, 0)
    assert merged.dtype == blocks[0].dtype and merged.shape == blocks[0].shape
    if dtype == "bfloat16":
        merged = (merged.astype(np.uint32) << 16).view(np.float32)
    tolerance = 1e-6 if dtype == "float32" else 2 * 2**-8 * np.abs(expected).max()
    np.testing.assert_allclose(merged, expected, atol=tolerance)


def test_a_group_of_one_is_its_expert():
    block = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)
    groups = group_experts(np.zeros(E), ORDER, E)
    np.testing.assert_array_equal(merge(lambda e: block + e, groups, 3), block + 3)


def test_only_the_most_used_are_averaged():
    """The others are stood for as before; a centre is always one of the most used."""
    counts = np.array([5, 0, 9, 1, 2, 3])
    every, some = group_experts(counts, ORDER, 2), group_experts(counts, ORDER, 2, most=3)
    assert some.of.tolist() == every.of.tolist()
    assert np.flatnonzero(some.weights).tolist() == [0, 2, 5]
    np.testing.assert_allclose(np.bincount(some.of, some.weights), np.ones(2))
    asked = []
    merge(lambda e: asked.append(e) or np.ones((3, 2, 2), np.float32), some, 0)
    merge(lambda e: asked.append(e) or np.ones((3, 2, 2), np.float32), some, 1)
    assert sorted(asked) == [0, 2, 5]
