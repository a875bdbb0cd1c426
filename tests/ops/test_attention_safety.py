"""What must not be read is not read, what must not be written is not written, what is wrong is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from tests.ops.oracle import make_case, mask64, run, run_packed

BAD = [np.nan, np.inf, -np.inf]


def poisoned(case, bad):
    """NaN or Inf wherever no token may look: beyond the lengths, in unused new tokens, in positions that nobody attends."""
    q, k_new, v_new, k, v, lengths = case.args
    B, T, *_ = case.shape
    used = jnp.asarray(mask64(case).any(1))[:, None, :, None]
    num_new = jnp.broadcast_to(case.options.get("num_new", T), (B,))
    unused = (jnp.arange(T) >= num_new[:, None])[:, :, None, None]
    bad_q, bad_k, bad_v = (jnp.where(unused, bad, x) for x in (q, k_new, v_new))
    return type(case)((bad_q, bad_k, bad_v, jnp.where(used, k, bad), jnp.where(used, v, bad), lengths), case.options)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("window", [None, 40])
def test_poison_changes_no_bit(isa, bad, window):
    num_new = jnp.array([5, 0, 3], jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        case = make_case(1, 3, 5, 4, 2, 40, 170, cache=dtype, lengths=[0, 100, 130], num_new=num_new, window=window)
        bad_case = poisoned(case, bad)
        np.testing.assert_array_equal(run(case)[0], run(bad_case)[0])
        np.testing.assert_array_equal(run(case)[0], run_packed(bad_case)[0])


@pytest.mark.parametrize("bad", BAD)
def test_a_masked_new_token_may_hold_anything(isa, bad):
    tree = jnp.asarray(np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool))
    case = make_case(2, 1, 4, 4, 2, 64, 90, lengths=[62], tree_mask=tree)
    q, k_new, v_new, k, v, lengths = case.args
    want = run(case)[0]
    bad_case = type(case)((q, k_new.at[:, 2].set(bad), v_new.at[:, 2].set(bad), k, v, lengths), case.options)
    got = run(bad_case)[0]
    attends = np.array([0, 1, 3])
    np.testing.assert_array_equal(got[:, attends], want[:, attends])


def test_poisoned_scales_of_int8_change_no_bit(isa):
    case = make_case(3, 2, 3, 4, 2, 32, 96, lengths=[5, 70])
    q, k_new, v_new, k, v, lengths = case.args
    cache = ops.pack_cache(k, v, jnp.int8)
    unused = jnp.arange(96) >= lengths[:, None, None]
    bad = type(cache)(cache.k, cache.v, jnp.where(unused, jnp.nan, cache.k_scale), jnp.where(unused, jnp.nan, cache.v_scale))
    want = ops.chunked_attention_packed(q, k_new, v_new, cache, lengths)[0]
    np.testing.assert_array_equal(ops.chunked_attention_packed(q, k_new, v_new, bad, lengths)[0], want)


def test_only_the_new_rows_are_written(isa):
    case = make_case(4, 3, 4, 2, 1, 16, 40, lengths=[0, 38, 17], num_new=jnp.array([4, 4, 2], jnp.int32))
    _, k_new, _, k, _, _ = case.args
    want = np.array(k)
    want[0, :, :4] = np.asarray(k_new[0]).swapaxes(0, 1)
    want[1, :, 38:] = np.asarray(k_new[1, :2]).swapaxes(0, 1)  # the other two fall beyond S
    want[2, :, 17:19] = np.asarray(k_new[2, :2]).swapaxes(0, 1)
    np.testing.assert_array_equal(run(case)[1], want)


def test_rows_without_tokens_are_zero(isa):
    case = make_case(5, 3, 4, 2, 1, 16, 40, lengths=[0, 38, 17], num_new=jnp.array([0, 4, 2], jnp.int32))
    out = np.asarray(run(case)[0])
    assert not out[0].any() and not out[2, 2:].any() and out[1].all(-1).all() and out[2, :2].all(-1).all()


def test_nonsense_lengths_stay_in_bounds(isa):
    for lengths in ([-5, 10_000], [-(2**31), 2**31 - 1]):
        case = make_case(6, 2, 3, 2, 1, 16, 24, lengths=lengths, num_new=jnp.array([99, -3], jnp.int32))
        out, k, _ = run(case)
        assert np.isfinite(out).all()
        np.testing.assert_array_equal(k[1], case.args[3][1])


def shifted(x, offset):
    """The same values 4 * offset bytes into an allocation."""
    x = np.asarray(x)
    raw = np.zeros(x.nbytes + 64, np.uint8)[4 * offset : 4 * offset + x.nbytes]
    raw[:] = np.frombuffer(x.tobytes(), np.uint8)
    return raw.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("offset", [1, 3, 9])
def test_misaligned_numpy_arguments(isa, offset):
    case = make_case(7, 2, 2, 4, 2, 24, 50)
    args = (shifted(x, offset) for x in case.args)
    np.testing.assert_array_equal(ops.chunked_attention(*args)[0], run(case)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=["f32", "bf16", "i8"])
def test_misaligned_packed_caches(isa, dtype):
    q, k_new, v_new, k, v, lengths = make_case(7, 2, 2, 4, 2, 24, 50).args
    cache = ops.pack_cache(k, v, dtype)
    want, _ = ops.chunked_attention_packed(q, k_new, v_new, cache, lengths)
    moved = jax.tree.map(lambda x: shifted(x, 3), cache)
    got, _ = ops.chunked_attention_packed(q, k_new, v_new, moved, lengths)
    np.testing.assert_array_equal(got, want)


WRONG = {
    "q": (dict(q=jnp.zeros((2, 3, 4))), ValueError, "q has shape"),
    "k_new": (dict(k_new=jnp.zeros((2, 2, 2, 16))), ValueError, "k_new has shape"),
    "v_cache": (dict(v_cache=jnp.zeros((2, 2, 31, 16))), ValueError, "v_cache has shape"),
    "heads": (dict(q=jnp.zeros((2, 3, 5, 16))), ValueError, "multiple of K"),
    "lengths_dtype": (dict(lengths=jnp.zeros(2)), TypeError, "lengths has dtype float32, wanted int32"),
    "cache_dtype": (dict(k_cache=jnp.zeros((2, 2, 32, 16), jnp.float16)), TypeError, "k_cache has dtype float16"),
    "mask": (dict(tree_mask=jnp.zeros((3, 4), bool)), ValueError, "tree_mask has shape"),
    "mask_dtype": (dict(tree_mask=jnp.zeros((3, 3))), TypeError, "tree_mask has dtype"),
    "num_new": (dict(num_new=jnp.zeros(3, jnp.int32)), ValueError, "num_new has shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, error, message = WRONG[name]
    case = make_case(8, 2, 3, 4, 2, 16, 32)
    names = ("q", "k_new", "v_new", "k_cache", "v_cache", "lengths")
    arguments = dict(zip(names, case.args, strict=True)) | change
    options = {k: arguments.pop(k) for k in list(arguments) if k not in names}
    with pytest.raises(error, match=message):
        ops.chunked_attention(*(arguments[n] for n in names), **options)


def test_head_dim_must_be_a_multiple_of_8():
    with pytest.raises(ValueError, match="D is 12, must be a multiple of 8"):
        ops.chunked_attention(*make_case(9, 1, 1, 1, 1, 12, 16).args)


WRONG_PACKED = {
    "heads": (ops.empty_cache(2, 3, 32, 16), {}, ValueError, "cache.v has shape"),
    "head_dim": (ops.empty_cache(2, 2, 32, 24), {}, ValueError, "cache.v has shape"),
    "requests": (ops.empty_cache(3, 2, 32, 16), {}, ValueError, "cache.v has shape"),
    "table": (ops.empty_cache(5, 2, 32, 16), dict(block_table=jnp.zeros((3, 2), jnp.int32)), ValueError, "block_table has shape"),
    "table_dtype": (ops.empty_cache(5, 2, 32, 16), dict(block_table=jnp.zeros((2, 2))), TypeError, "block_table has dtype"),
}


@pytest.mark.parametrize("name", WRONG_PACKED)
def test_wrong_packed_arguments_are_named(name):
    cache, options, error, message = WRONG_PACKED[name]
    q, k_new, v_new, _, _, lengths = make_case(8, 2, 3, 4, 2, 16, 32).args
    with pytest.raises(error, match=f"chunked_attention_packed: .*{message}"):
        ops.chunked_attention_packed(q, k_new, v_new, cache, lengths, **options)


def test_a_packed_call_has_at_most_64_tokens():
    q, k_new, v_new, k, v, lengths = make_case(8, 1, 65, 1, 1, 8, 80).args
    with pytest.raises(ValueError, match="at most 64 new tokens a call, got T 65"):
        ops.chunked_attention_packed(q, k_new, v_new, ops.pack_cache(k, v), lengths)
