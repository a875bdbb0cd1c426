"""Writing to some rows of an array in its own memory, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax import ops
from specmoe_jax.ops.xla import rows as xla

DTYPES = ("float32", "bfloat16", "int8", "uint16")


@st.composite
def cases(draw):
    """An array, rows for it and places: some beyond either end, no two alike."""
    held, count = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    line = draw(st.sampled_from([(), (1,), (3, 5), (2, 70_000)]))
    at = draw(st.lists(st.integers(-3, held + 3), min_size=count, max_size=count, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    array, rows = (jnp.asarray(rng.integers(0, 99, (n, *line)), dtype) for n in (held, count))
    return array, rows, np.array(at, np.int32)


@given(cases())
@settings(max_examples=40)
def test_rows_are_where_they_belong(case):
    array, rows, at = case
    want = np.array(array)
    for row, place in zip(np.asarray(rows), at, strict=True):
        if 0 <= place < len(want):
            want[place] = row
    np.testing.assert_array_equal(jax.jit(ops.put_rows)(array, rows, at), want)
    np.testing.assert_array_equal(jax.jit(xla.put)(array, rows, at), want)


def appended(cache, new, lengths, num_new):
    want = np.array(cache)
    for b, (length, count) in enumerate(zip(lengths, num_new, strict=True)):
        for t in range(min(count, want.shape[2] - length)):
            want[b, :, length + t] = new[b, t]
    return want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("append", [ops.append, xla.append])
def test_new_positions_of_every_row(append, dtype):
    rng = np.random.default_rng(0)
    cache, new = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((3, 2, 10, 4), (3, 5, 2, 4)))
    for lengths, num_new in (([0, 4, 7], [5, 0, 2]), ([8, 9, 10], [5, 5, 1])):
        lengths, num_new = (np.array(x, np.int32) for x in (lengths, num_new))
        want = appended(cache, np.asarray(new), lengths, num_new)
        np.testing.assert_array_equal(jax.jit(append)(cache, new, lengths, num_new), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_cache_stays_where_it_is(kernels, dtype):
    """XLA alone copies all of it in bfloat16: 48 ms where 0.2 do, for each layer's keys and values when a request joins."""
    put = jax.jit(ops.put_rows, donate_argnums=0)
    append = jax.jit(ops.append, donate_argnums=0)
    cache = jnp.zeros((4, 2, 64, 16), dtype)
    place = cache.unsafe_buffer_pointer()
    cache = put(cache, jnp.ones((1, 2, 64, 16), dtype), np.array([2], np.int32))
    cache = append(cache, jnp.ones((4, 3, 2, 16), dtype), np.zeros(4, np.int32), np.full(4, 3, np.int32))
    assert cache.unsafe_buffer_pointer() == place
    assert float(cache.astype(jnp.float32).sum()) == 2 * 64 * 16 + 3 * 3 * 2 * 16
    temporary = put.lower(cache, cache[:1], np.array([2], np.int32)).compile().memory_analysis().temp_size_in_bytes
    assert temporary < cache.nbytes / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_is_written_in_its_place(kernels, dtype):
    """In bfloat16 an expert that arrived took the time of a copy of all slots."""
    pool = jnp.zeros((3, 2, 50), dtype)
    place, write = pool.unsafe_buffer_pointer(), jax.jit(ops.put_row, donate_argnums=0)
    pool = write(pool, jnp.ones((2, 50), dtype), np.int32(2))
    assert pool.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(np.asarray(pool).astype(int).sum((1, 2)), [0, 0, 100])
    smaller = np.asarray(write(pool, jnp.full((2, 20), 2, dtype), np.int32(0))).astype(int)
    assert smaller[0, :, :20].min() == 2 and not smaller[0, :, 20:].any() and smaller.sum() == 180
    with pytest.raises(ValueError, match="row has shape"):
        ops.put_row(pool, jnp.ones((3, 50), dtype), np.int32(0))


def test_one_that_is_not_donated_is_kept():
    array = jnp.zeros((3, 4))
    put = ops.put_rows(array, jnp.ones((1, 4)), jnp.array([1], jnp.int32))
    assert not np.any(array) and np.asarray(put).sum() == 4


@pytest.mark.parametrize(
    "rows, at, error",
    [
        (jnp.ones((1, 3)), np.zeros(1, np.int32), "rows has shape"),
        (jnp.ones((1, 2), jnp.bfloat16), np.zeros(1, np.int32), "rows has dtype"),
        (jnp.ones((1, 2)), np.zeros(2, np.int32), "at has shape"),
        (jnp.ones((1, 2)), np.zeros(1, np.int64), "at has dtype"),
    ],
)
def test_what_does_not_fit_is_refused(rows, at, error):
    with pytest.raises((ValueError, TypeError), match=error):
        ops.put_rows(jnp.ones((4, 2)), rows, at)


def test_the_attention_without_a_kernel_appends_in_place(kernels, monkeypatch):
    """A chunk of a prompt, longer than the kernel takes."""
    monkeypatch.setattr("specmoe_jax.ops.cpu.attention.fits", lambda *_, **__: False)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, 9, 4, 8), (1, 9, 2, 8), (1, 9, 2, 8)))
    attend = jax.jit(functools.partial(ops.chunked_attention), donate_argnums=(3, 4))
    caches = [jnp.zeros((1, 2, 40, 8), jnp.bfloat16) for _ in range(2)]
    places = [cache.unsafe_buffer_pointer() for cache in caches]
    _, *caches = attend(q, k, v, *caches, np.array([3], np.int32))
    assert [cache.unsafe_buffer_pointer() for cache in caches] == places
    np.testing.assert_array_equal(caches[0][0, :, 3:12].swapaxes(0, 1), k[0])
