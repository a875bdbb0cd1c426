"""chunked_attention against float64, on every instruction set of the machine, in every layout and cache type."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax import ops
from tests.ops.oracle import assert_accurate, make_case, run, run_packed

F32, BF16 = jnp.float32, jnp.bfloat16

CASES = {
    "gqa": dict(B=2, T=5, H=8, K=2, D=64, S=150),
    "mqa_tree": dict(B=2, T=4, H=6, K=1, D=40, S=70, tree=True),
    "mha_one_token": dict(B=3, T=1, H=3, K=3, D=80, S=90),
    "long": dict(B=1, T=3, H=4, K=2, D=32, S=2300, lengths=[2290]),
    "empty_cache": dict(B=2, T=6, H=4, K=2, D=8, S=16, lengths=[0, 0]),
    "window": dict(B=2, T=7, H=4, K=1, D=24, S=210, window=65),
    "window_tree": dict(B=2, T=7, H=4, K=2, D=96, S=130, window=3, tree=True),
    "softcap": dict(B=2, T=3, H=8, K=4, D=72, S=80, softcap=2.0, scale=1.5),
    "group_16": dict(B=1, T=4, H=32, K=2, D=128, S=67, lengths=[63]),
    "wide": dict(B=1, T=2, H=2, K=1, D=256, S=33),
    "d_192": dict(B=1, T=3, H=4, K=4, D=192, S=81),
    "64_new_tokens": dict(B=2, T=64, H=2, K=1, D=48, S=161, lengths=[97, 0], tree=True),
    "ragged": dict(B=5, T=3, H=4, K=2, D=16, S=300, lengths=[0, 1, 63, 64, 297], num_new=jnp.array([3, 0, 2, 1, 3], jnp.int32)),
    "bf16_queries": dict(B=2, T=5, H=8, K=2, D=64, S=150, query=BF16),
}


@pytest.mark.parametrize("cache", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_rows_agree_with_float64(isa, name, cache):
    case = make_case(1, cache=cache, **CASES[name])
    out, k, v = run(case)
    assert_accurate(case, out, k, v)


@pytest.mark.parametrize("name", CASES)
def test_packed_gives_the_bits_of_rows(isa, name):
    for cache in (F32, BF16):
        case = make_case(2, cache=cache, **CASES[name])
        out, k, v = run(case)
        packed_out, packed = run_packed(case)
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(packed_out, np.float32))
        for a, b in zip(ops.unpack_cache(packed, k.shape[2]), (k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("T", range(1, 27))
def test_every_number_of_query_rows(isa, T):
    """Register tiles of every size and every pair of sizes; 13 rows are 7 and 6, which take unlike numbers of columns."""
    case = make_case(10, B=1, T=T, H=1, K=1, D=40, S=170, lengths=[140])
    assert_accurate(case, *run(case))


@pytest.mark.parametrize("name", ["gqa", "mqa_tree", "window", "softcap", "ragged", "long"])
def test_int8_agrees_with_float64_on_what_is_stored(isa, name):
    case = make_case(3, **CASES[name])
    out, cache = run_packed(case, jnp.int8)
    assert_accurate(case, out, *ops.unpack_cache(cache, case.shape[4]))


@pytest.mark.parametrize("name", CASES)
def test_the_reference_agrees_with_float64(name):
    case = make_case(4, **CASES[name])
    assert_accurate(case, *run(case, ops.chunked_attention_ref))


@pytest.mark.parametrize("name", CASES)
def test_xla_agrees_with_float64(xla_alone, name):
    case = make_case(4, **CASES[name])
    assert_accurate(case, *run(case))


def assert_packed_agrees_with_the_reference(dtype, **changes):
    case = make_case(5, **CASES["ragged"] | changes)
    q, k_new, v_new, k, v, lengths = case.args
    args = q, k_new, v_new, ops.pack_cache(k, v, dtype), lengths
    got, want = ops.chunked_attention_packed(*args, **case.options), ops.chunked_attention_packed_ref(*args, **case.options)
    np.testing.assert_allclose(got[0], want[0], atol=4e-6)
    for name in ("k", "v", "k_scale", "v_scale"):
        np.testing.assert_array_equal(np.asarray(getattr(got[1], name)), np.asarray(getattr(want[1], name)))


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.int8], ids=["f32", "bf16", "i8"])
def test_caches_of_kernel_and_reference_are_equal(kernels, dtype):
    assert_packed_agrees_with_the_reference(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.int8], ids=["f32", "bf16", "i8"])
def test_caches_of_xla_and_reference_are_equal(xla_alone, dtype):
    assert_packed_agrees_with_the_reference(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("chunk", [None, 12, 500])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_sinks_and_chunks_agree_with_the_reference(with_sinks, chunk, tree):
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    case = make_case(11, B=3, T=6, H=4, K=2, D=16, S=64, lengths=[0, 9, 40], tree=tree, sinks=sinks, chunk=chunk, window=30)
    for got, want in zip(run(case), run(case, ops.chunked_attention_ref), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    q, k_new, v_new, k, v, lengths = case.args
    args = q, k_new, v_new, ops.pack_cache(k, v), lengths
    got, want = (op(*args, **case.options) for op in (ops.chunked_attention_packed, ops.chunked_attention_packed_ref))
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_array_equal(got[1].k, want[1].k)


def test_a_sink_takes_its_share_of_the_attention():
    case = make_case(12, B=1, T=1, H=2, K=1, D=8, S=16, lengths=[3])
    sinks = jnp.asarray([-jnp.inf, 1e4], jnp.float32)
    out = np.asarray(ops.chunked_attention(*case.args, sinks=sinks)[0])
    np.testing.assert_allclose(out[:, :, 0], ops.chunked_attention(*case.args)[0][:, :, 0], atol=1e-6)
    assert not out[:, :, 1].any()


@pytest.mark.parametrize("dtype", [F32, BF16, jnp.int8], ids=["f32", "bf16", "i8"])
@pytest.mark.parametrize("page", [16, 48])
def test_pages_give_the_bits_of_a_whole_cache(isa, dtype, page):
    case = make_case(6, B=3, T=4, H=4, K=2, D=40, S=3 * page, window=50)
    q, k_new, v_new, k, v, lengths = case.args
    whole = ops.pack_cache(k, v, dtype)
    table = jnp.asarray(np.random.default_rng(0).permutation(11)[:9].reshape(3, 3), jnp.int32)
    split = lambda x: jnp.moveaxis(x.reshape(3, 2, 3, page, 40), 1, 2).reshape(9, 2, page, 40)  # noqa: E731
    fill = lambda x: jnp.full((11, 2, page, 40), jnp.nan).at[table.reshape(-1)].set(split(x))  # noqa: E731
    paged = ops.pack_cache(fill(k), fill(v), dtype)
    want, _ = ops.chunked_attention_packed(q, k_new, v_new, whole, lengths, window=50)
    got, _ = ops.chunked_attention_packed(q, k_new, v_new, paged, lengths, window=50, block_table=table)
    np.testing.assert_array_equal(got, want)


def test_a_bad_table_entry_ends_the_capacity(isa):
    case = make_case(7, B=1, T=2, H=2, K=1, D=16, S=16, lengths=[15])
    q, k_new, v_new, k, v, lengths = case.args
    want, _, _ = ops.chunked_attention(*case.args)
    cache = ops.pack_cache(jnp.concatenate([k, k * jnp.nan]), jnp.concatenate([v, v * jnp.nan]))
    for bad in (-1, 2, 2**31 - 1):
        table = jnp.array([[0, bad]], jnp.int32)
        got, _ = ops.chunked_attention_packed(q, k_new, v_new, cache, lengths, block_table=table)
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    T=st.integers(1, 9),
    group=st.integers(1, 5),
    K=st.integers(1, 3),
    D8=st.integers(1, 13),
    S=st.integers(9, 140),
    window=st.sampled_from([None, 1, 7, 64]),
    cache=st.sampled_from([F32, BF16]),
)
def test_any_shape(kernels_or_skip, seed, T, group, K, D8, S, window, cache):
    case = make_case(seed, 2, T, group * K, K, 8 * D8, S, cache=cache, window=window, tree=seed % 2 == 0)
    out, k, v = ops.chunked_attention(*case.args, **case.options)
    assert_accurate(case, out, k, v)


@pytest.fixture(scope="module")
def kernels_or_skip():
    if not ops.isas():
        pytest.skip("the compiled kernels are not usable here")


@pytest.mark.parametrize("kind", ["huge", "equal", "dominating"])
def test_adversarial_logits(isa, kind):
    case = make_case(8, B=1, T=3, H=4, K=2, D=64, S=400, lengths=[390])
    q, k_new, v_new, k, v, lengths = case.args
    if kind == "huge":
        q = q * 1e4
    elif kind == "equal":
        k, k_new = jnp.ones_like(k), jnp.ones_like(k_new)
    else:
        k = k.at[:, :, 77].set(30 * q[0, 0, 0])
    case = type(case)((q, k_new, v_new, k, v, lengths), {})
    out, k, v = run(case)
    assert_accurate(case, out, k, v)


@pytest.mark.slow
def test_relative_rms_on_gaussian_data(isa):
    case = make_case(9, B=1, T=8, H=8, K=2, D=128, S=3000, lengths=[2990])
    out, k, v = run(case)
    from tests.ops.oracle import attend64

    want, _, _ = attend64(case, np.asarray(k), np.asarray(v))
    assert np.sqrt(np.mean((np.asarray(out) - want) ** 2) / np.mean(want**2)) <= 1.5e-6
