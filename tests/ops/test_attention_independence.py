"""A token's bits depend on nothing but itself and what it attends: not on T, batch mates, threads, how the work is split."""

import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from tests.ops.oracle import make_case, run


@pytest.mark.parametrize("cache", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_chunk_gives_the_bits_of_one_token_at_a_time(isa, cache):
    case = make_case(1, B=2, T=7, H=8, K=2, D=80, S=1100, cache=cache, lengths=[1021, 60])
    q, k_new, v_new, k, v, lengths = case.args
    chunk, _, _ = run(case)
    for t in range(7):
        one, k, v = ops.chunked_attention(q[:, t : t + 1], k_new[:, t : t + 1], v_new[:, t : t + 1], k, v, lengths + t)
        np.testing.assert_array_equal(one[:, 0], chunk[:, t])


def test_a_tree_branch_gives_the_bits_of_a_chain(isa):
    case = make_case(2, B=1, T=5, H=4, K=2, D=64, S=200, lengths=[64])
    q, k_new, v_new, k, v, lengths = case.args
    parents = np.array([-1, 0, 0, 1, 2])  # two branches: 0-1-3 and 0-2-4
    tree = np.eye(5, dtype=bool)
    for t, p in enumerate(parents):
        if p >= 0:
            tree[t] |= tree[p]
    out, _, _ = ops.chunked_attention(q, k_new, v_new, k, v, lengths, tree_mask=jnp.asarray(tree))
    branch = jnp.array([0, 1])
    chain, _, _ = ops.chunked_attention(q[:, branch], k_new[:, branch], v_new[:, branch], k, v, lengths)
    np.testing.assert_array_equal(out[:, branch], chain)
    mates = jnp.array([0, 2, 4])  # not neighbours in the cache, so only the value is the same
    chain, _, _ = ops.chunked_attention(q[:, mates], k_new[:, mates], v_new[:, mates], k, v, lengths)
    np.testing.assert_allclose(out[:, mates], chain, rtol=0, atol=2e-6)


def test_batch_mates_and_threads_change_nothing(isa, monkeypatch):
    case = make_case(3, B=6, T=3, H=4, K=2, D=32, S=2500, lengths=[2400, 0, 17, 1024, 2047, 64])
    outs = []
    for threads in ("1", "2", "0"):
        monkeypatch.setenv("SPECMOE_THREADS", threads)
        outs.append(np.asarray(run(case)[0]))
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])
    for b in range(6):  # alone: few heads, so the sequence itself is split over the threads
        alone, _, _ = ops.chunked_attention(*(x[b : b + 1] for x in case.args))
        np.testing.assert_array_equal(alone[0], outs[0][b])


def test_capacity_changes_nothing(isa):
    case = make_case(4, B=2, T=2, H=2, K=1, D=48, S=129, lengths=[127, 31])
    q, k_new, v_new, k, v, lengths = case.args
    out, _, _ = run(case)
    wider = [jnp.pad(x, ((0, 0), (0, 0), (0, 400), (0, 0)), constant_values=jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(ops.chunked_attention(q, k_new, v_new, *wider, lengths)[0], out)


@pytest.mark.slow
def test_more_than_64_tokens_give_the_bits_of_pieces(isa):
    case = make_case(5, B=2, T=130, H=2, K=1, D=16, S=200, lengths=[0, 9], num_new=jnp.array([130, 70], jnp.int32))
    q, k_new, v_new, k, v, lengths = case.args
    out, k_after, _ = run(case)
    first, k, v = ops.chunked_attention(q[:, :64], k_new[:, :64], v_new[:, :64], k, v, lengths)
    np.testing.assert_array_equal(out[:, :64], first)
    ref, k_ref, _ = run(case, ops.chunked_attention_ref)
    np.testing.assert_allclose(out, ref, atol=4e-6)
    np.testing.assert_array_equal(k_after, k_ref)
