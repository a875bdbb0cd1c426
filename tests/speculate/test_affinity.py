import os
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specmoe_jax.speculate.hot_experts.affinity import expert_distances, load_table, neighbours, save_table, substitutes

E = 6


def experts(*, num_experts=E, hidden=8, model=5, seed=0, shared=0.0) -> np.ndarray:
    """[E, 3, F, M] float32; `shared` is the size of a part that all experts have in common."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(num_experts, 3, hidden, model))
    return (own + shared * rng.normal(size=own.shape[1:])).astype(np.float32)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32, truncated."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def pairwise(weights: np.ndarray) -> np.ndarray:
    flat = weights.reshape(len(weights), -1).astype(np.float64)
    return np.linalg.norm(flat[:, None] - flat[None], axis=-1)


@given(
    num_experts=st.integers(1, 9),
    hidden=st.integers(1, 9),
    block_size=st.integers(1, 400),
    shared=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_distances_are_l2_over_all_weights(num_experts, hidden, block_size, shared, seed):
    """Also where a part common to all experts is a thousand times larger than what tells them apart."""
    weights = experts(num_experts=num_experts, hidden=hidden, seed=seed, shared=shared)
    distances = expert_distances(lambda e: weights[e], num_experts, block_size)
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, pairwise(weights), rtol=1e-5)
    np.testing.assert_array_equal(distances, distances.T)
    assert (np.diagonal(distances) == 0).all()


def test_distances_of_bfloat16_bits():
    bits = bfloat16_bits(experts())
    floats = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(expert_distances(lambda e: bits[e], E), expert_distances(lambda e: floats[e], E))


def test_equal_experts_are_nearest_to_each_other():
    weights = experts(shared=10.0)
    weights[4] = weights[1]
    distances = expert_distances(lambda e: weights[e], E)
    assert distances[1, 4] < 1e-6 * distances[1, 2]
    assert neighbours(distances)[[1, 4], 1].tolist() == [4, 1]


@pytest.mark.parametrize("encode", [np.copy, bfloat16_bits])
def test_less_than_two_experts_are_alive_beside_the_blocks(encode):
    weights = encode(experts(num_experts=8, hidden=1024, model=512))
    tracemalloc.start()
    expert_distances(lambda e: weights[e], 8, block_size=1 << 30)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * weights[0].nbytes


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="weights are float64; they must be float32 or uint16"):
        expert_distances(lambda e: np.zeros((3, 8, 8)), 2)


DISTANCES = hnp.arrays(np.float32, (E, E), elements=st.integers(0, 3).map(float))


@given(DISTANCES)
def test_neighbours_are_sorted_with_oneself_first(distances):
    table = neighbours(distances)
    assert table.dtype == np.int32
    for e, row in enumerate(table):
        others = sorted((x for x in range(E) if x != e), key=lambda x: (distances[e, x], x))
        assert row.tolist() == [e, *others]


@given(DISTANCES, hnp.arrays(bool, E))
def test_substitutes_are_the_nearest_residents(distances, resident):
    table = neighbours(distances)
    if not resident.any():
        with pytest.raises(ValueError, match="no expert is resident"):
            substitutes(table, resident)
        return
    chosen = substitutes(table, resident)
    assert chosen.dtype == np.int32
    for e in range(E):
        assert chosen[e] == next(x for x in table[e] if resident[x])
        assert chosen[e] == e or not resident[e]


@pytest.fixture
def tables():
    """[L, E, E] of two layers."""
    return np.stack([neighbours(pairwise(experts(seed=layer))) for layer in range(2)])


def test_a_table_survives_the_disk(tmp_path, tables):
    save_table(tmp_path / "affinity.npz", np.zeros((2, E, E)))
    save_table(tmp_path / "affinity.npz", tables)
    loaded = load_table(tmp_path / "affinity.npz", 2, E)
    np.testing.assert_array_equal(loaded, tables)
    assert loaded.dtype == np.int32
    assert os.listdir(tmp_path) == ["affinity.npz"]


def test_a_write_that_fails_leaves_nothing(tmp_path, tables):
    with mock.patch("os.replace", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        save_table(tmp_path / "affinity.npz", tables)
    assert os.listdir(tmp_path) == []


def test_what_is_not_the_models_table_is_refused(tmp_path, tables):
    path = tmp_path / "affinity.npz"
    with pytest.raises(FileNotFoundError):
        load_table(path, 2, E)
    save_table(path, tables)
    for layers, num_experts in ((3, E), (2, E + 1)):
        with pytest.raises(ValueError, match="holds no neighbour lists of shape"):
            load_table(path, layers, num_experts)
    save_table(path, np.zeros_like(tables))
    with pytest.raises(ValueError, match="holds no neighbour lists"):
        load_table(path, 2, E)
    content = path.read_bytes()
    for broken in (b"", b"not a table", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a neighbour table"):
            load_table(path, 2, E)
