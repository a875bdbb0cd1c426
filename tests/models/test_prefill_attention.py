"""attend_chunk against attention in full, for every variant of a layer: chunk after chunk, beside what others left in the rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.models.attention import allowed, append_paged, attend_paged, scores_and_values
from specmoe_jax.models.prefill_attention import attend_chunk
from specmoe_jax.ops import empty_cache

VARIANTS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "chunk": {"chunk": 6},
    "sinks": {},
    "padded rows": {"head_dim": 12},
}


def config_of(name):
    fields = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "scale": 0.3, "rope": None} | VARIANTS[name]
    return AttentionConfig(**fields)


def arrays(rng, config, rows, length):
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return [rng.normal(size=(rows, length, n, config.head_dim)).astype(np.float32) for n in heads]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(VARIANTS)), st.integers(1, 5), st.lists(st.integers(0, 14), min_size=1, max_size=3), st.integers(0, 99)
)
def test_chunks_of_ragged_prompts_are_attention_in_full(name, chunk, counts, seed):
    config, rng = config_of(name), np.random.default_rng(seed)
    rows, longest = len(counts), max(*counts, 1)
    sinks = rng.normal(size=config.num_heads).astype(np.float32) if name == "sinks" else None
    padded = -(-longest // chunk) * chunk
    q, k, v = arrays(rng, config, rows, padded)
    staged = [
        jnp.full((rows, config.num_kv_heads, padded + chunk, config.cache_dim), np.nan) for _ in range(2)
    ]  # of another request
    for start in range(0, padded, chunk):
        new = np.clip(np.array(counts) - start, 0, chunk).astype(np.int32)
        lengths = np.minimum(start, counts).astype(np.int32)
        piece = [a[:, start : start + chunk] for a in (q, k, v)]
        out, *staged = attend_chunk(config, *piece, sinks, *staged, jnp.asarray(lengths), jnp.asarray(new))
        seen = np.broadcast_to(allowed(config, start + jnp.arange(chunk), jnp.arange(padded)), (rows, chunk, padded))
        whole = scores_and_values(config, piece[0], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), seen, sinks)
        for row in range(rows):
            np.testing.assert_allclose(out[row, : new[row]], whole[row, : new[row]], rtol=2e-5, atol=2e-6)
            assert not np.any(out[row, new[row] :])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [5, 70])
def test_appending_alone_leaves_the_same_cache(length, dtype):
    """Bit for bit what attending leaves, also for more than a kernel call takes, and nothing of other pages."""
    config, rng = config_of("padded rows"), np.random.default_rng(0)
    table = jnp.asarray([[3, 1], [0, -1]], jnp.int32)
    lengths, num_new = jnp.asarray([20, 0], jnp.int32), jnp.asarray([length, min(length, 64)], jnp.int32)
    q, k, v = (jnp.asarray(a, dtype) for a in arrays(rng, config, 2, length))
    cache = empty_cache(5, config.num_kv_heads, 64, config.cache_dim, dtype)
    _, attended = attend_paged(config, q, k, v, None, cache, table, lengths, num_new)
    appended = append_paged(config, k, v, cache, table, lengths, num_new)
    assert np.array_equal(attended.k, appended.k) and np.array_equal(attended.v, appended.v)
    assert np.any(np.asarray(appended.v, np.float32)[[3, 0]]) and not np.any(np.asarray(appended.v, np.float32)[[2, 4]])
