"""expert_ffn against float64; each (token, choice) depends on nothing but itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops


def make(seed, n, A, R, M, F, weights=jnp.float32, x_dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, M)), x_dtype)
    blocks = jnp.asarray(rng.normal(size=(R, 3, F, M)) / np.sqrt(M), weights)
    return x, blocks, jnp.asarray(rng.integers(-1, R, size=(n, A)), jnp.int32)


def ffn64(x, blocks, slots):
    """(y, bound): the bound sums the magnitudes that enter each sum, so that a tolerance follows from eps alone."""
    x, blocks, slots = np.asarray(x, np.float64), np.asarray(blocks.astype(jnp.float32), np.float64), np.asarray(slots)
    y = np.zeros((*slots.shape, x.shape[1]))
    bound = np.zeros_like(y)
    for i, a in np.ndindex(*slots.shape):
        if 0 <= slots[i, a] < len(blocks):
            gate, up, down = blocks[slots[i, a]]
            g, u = np.clip(gate @ x[i], -700, None), up @ x[i]
            ag, au = np.abs(gate) @ np.abs(x[i]), np.abs(up) @ np.abs(x[i])
            y[i, a] = (g / (1 + np.exp(-g)) * u) @ down
            bound[i, a] = ((ag + 1) * (au + np.abs(u))) @ np.abs(down)
    return y, bound


SHAPES = {
    "one_token": (1, 2, 4, 64, 32),
    "odd": (9, 2, 5, 200, 77),
    "tiny": (3, 1, 1, 3, 1),
    "two_model_blocks": (7, 2, 3, 1030, 300),
    "many_rows": (70, 2, 3, 48, 40),
}


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_and_ref_agree_with_float64(isa, name, weights):
    args = make(1, *SHAPES[name], weights)
    want, bound = ffn64(*args)
    for op in (ops.expert_ffn, ops.expert_ffn_ref):
        assert np.all(np.abs(np.asarray(jax.jit(lambda *a, op=op: op(*a))(*args)) - want) <= 8 * 2.0**-24 * bound)


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_tiles_agree_with_float64(xla_alone, name, weights):
    args = make(1, *SHAPES[name], weights)
    want, bound = ffn64(*args)
    assert np.all(np.abs(np.asarray(jax.jit(ops.expert_ffn)(*args)) - want) <= 8 * 2.0**-24 * bound)


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_experts_by_address_are_those_of_a_pool(isa, name, weights):
    """Each in memory of its own, in another order than in the pool; bit for bit."""
    x, blocks, slots = make(2, *SHAPES[name], weights, weights)
    apart = [jnp.array(block) for block in reversed(blocks)]
    addresses = np.array([block.unsafe_buffer_pointer() for block in reversed(apart)], np.uint64)
    table = jnp.asarray(addresses.view(np.uint32).reshape(-1, 2))
    hidden = blocks.shape[2]
    found = jax.jit(lambda *args: ops.expert_ffn_table(*args, hidden=hidden))(x, table, slots)
    assert (np.asarray(found) == np.asarray(jax.jit(lambda *args: ops.expert_ffn(*args))(x, blocks, slots))).all()


@pytest.mark.slow
def test_tiles_read_bits_and_no_unused_slots(xla_alone):
    test_bits_in_uint16_are_bfloat16(None)
    test_no_expert_gives_zeros_and_unused_slots_are_not_read(None)


def test_bits_in_uint16_are_bfloat16(isa):
    x, blocks, slots = make(2, 5, 2, 4, 64, 48, jnp.bfloat16, jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(blocks, jnp.uint16)
    for op in (ops.expert_ffn, ops.expert_ffn_ref):
        np.testing.assert_array_equal(op(x, bits, slots), op(x, blocks, slots))


def test_a_pair_depends_on_itself_alone(isa, monkeypatch):
    x, blocks, slots = make(3, 40, 2, 3, 136, 90, jnp.bfloat16)
    y = ops.expert_ffn(x, blocks, slots)
    for n in (1, 2, 7):
        for i in (0, 11):
            np.testing.assert_array_equal(ops.expert_ffn(x[i : i + n], blocks, slots[i : i + n]), y[i : i + n])
    monkeypatch.setenv("SPECMOE_THREADS", "1")
    np.testing.assert_array_equal(jax.jit(lambda *a: ops.expert_ffn(*a))(x, blocks, slots), y)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(ops.expert_ffn(x[order], blocks, slots[order]), y[order])


def test_no_expert_gives_zeros_and_unused_slots_are_not_read(isa):
    x, blocks, _ = make(4, 3, 2, 4, 32, 24)
    slots = jnp.array([[-1, 2], [2, -1], [-1, 4]], jnp.int32)
    for op in (ops.expert_ffn, ops.expert_ffn_ref):
        y = np.asarray(op(x, blocks.at[jnp.array([0, 1, 3])].set(jnp.nan), slots))
        assert np.isfinite(y).all() and not y[0, 0].any() and not y[1, 1].any() and not y[2].any() and y[0, 1].all()


def test_extreme_gates_stay_finite(isa):
    x = jnp.array([[1e4, -1e4, 1e4, 1e4, 0, 0, 0, 0]], jnp.float32)
    blocks = jnp.ones((1, 3, 8, 8)) * jnp.where(jnp.arange(8) % 2, 1.0, -1.0)[:, None]
    slots = jnp.zeros((1, 1), jnp.int32)
    want, _ = ffn64(x, blocks, slots)
    np.testing.assert_allclose(ops.expert_ffn(x, blocks, slots), want, rtol=1e-5)


@pytest.mark.parametrize("n, A", [(0, 2), (2, 0)])
def test_nothing_to_do(n, A):
    assert ops.expert_ffn(jnp.zeros((n, 8)), jnp.zeros((2, 3, 8, 8)), jnp.zeros((n, A), jnp.int32)).shape == (n, A, 8)


def test_wrong_arguments_are_named():
    x, blocks, slots = make(5, 2, 2, 2, 16, 8)
    with pytest.raises(ValueError, match=r"blocks has shape \(2, 3, 8, 15\), wanted \[any, 3, any, 16\]"):
        ops.expert_ffn(x, blocks[..., :15], slots)
    with pytest.raises(TypeError, match="slots has dtype int16, wanted int32"):
        ops.expert_ffn(x, blocks, slots.astype(jnp.int16))
    with pytest.raises(ValueError, match="only 'swiglu' exists"):
        ops.expert_ffn(x, blocks, slots, activation="relu")
