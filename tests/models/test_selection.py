"""Attention to chosen positions: any passes over rows or pages give the definition's mask over the whole text.

And a choice on its way to the layers that share it arrives as it was made, in any type that hidden states have.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.config.layer_config import AttentionConfig, Indexer, Latent, Rope
from specmoe_jax.models import attention
from specmoe_jax.models.model import reference_attention
from specmoe_jax.models.prefill_attention import attend_chunk
from specmoe_jax.models.selection import handed, indexer
from specmoe_jax.ops import empty_cache
from specmoe_jax.speculate.trees import make_tree

CONFIG = AttentionConfig(
    num_heads=3, num_kv_heads=1, head_dim=14, scale=0.3, rope=None, latent=Latent(rank=8, nope=4, rope=4, value=5),
    indexer=Indexer(heads=5, dim=6, kept=4, rope=Rope.plain(1e4, 4)),
)  # fmt: skip
BATCH, LENGTH, PAGE = 2, 40, 16
TOLERANCE = 1e-5


def rows_of(seed: int, count: int):
    """q with what it asks for, k and v with an index key behind the latent."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((BATCH, count, 3, CONFIG.query_dim), np.float32)
    k, v = rng.standard_normal((2, BATCH, count, 1, CONFIG.head_dim), np.float32)
    return q, k, v


TEXT = rows_of(0, LENGTH)
EXPECTED = np.asarray(reference_attention(CONFIG, *map(jnp.asarray, TEXT)))
ATTEND = jax.jit(lambda *a: attention.attend(CONFIG, *a))
ATTEND_PAGED = jax.jit(lambda *a: attention.attend_paged(CONFIG, *a))
ATTEND_CHUNK = jax.jit(lambda *a: attend_chunk(CONFIG, *a))


def test_the_definition():
    """One query at a time: scores, the best four, softmax over those alone."""
    q, asked = indexer.asked_of(CONFIG, jnp.asarray(TEXT[0]))
    asked = np.asarray(asked)
    for row, at in ((0, 2), (0, 17), (1, 39)):
        keys = TEXT[2][row, : at + 1, 0, 8:14]
        scores = asked[row, at, :, 6] @ np.maximum(asked[row, at, :, :6] @ keys.T, 0)
        best = np.sort(np.argsort(-scores, kind="stable")[:4])
        logits = 0.3 * np.asarray(q)[row, at] @ TEXT[1][row, best, 0].T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        wanted = p / p.sum(-1, keepdims=True) @ TEXT[2][row, best, 0]
        np.testing.assert_allclose(EXPECTED[row, at], wanted, atol=TOLERANCE)


def passes(widths):
    """(lengths, num_new, rows) of a text read by both sequences, the second a position behind where there are several."""
    lengths = np.zeros(BATCH, np.int32)
    for width in widths:
        num_new = np.minimum(np.array([width, max(width - 1, 1)]), LENGTH - lengths).astype(np.int32)
        index = np.minimum(lengths[:, None] + np.arange(width), LENGTH - 1)[..., None, None]
        yield lengths, num_new, [np.take_along_axis(a, index, axis=1) for a in TEXT]
        lengths = lengths + num_new


def check(out, lengths, num_new):
    for row in range(BATCH):
        wanted = EXPECTED[row, lengths[row] : lengths[row] + num_new[row]]
        np.testing.assert_allclose(out[row, : num_new[row], :, :8], wanted[..., :8], atol=TOLERANCE)


WIDTHS = (11, 5, 1, 5, 1, 9)  # more than are gathered at once, and fewer


def test_rows_in_any_passes():
    caches = [jnp.full((BATCH, 1, LENGTH + 8, CONFIG.cache_dim), np.nan) for _ in range(2)]
    for lengths, num_new, rows in passes(WIDTHS):
        out, *caches = ATTEND(*rows, None, *caches, lengths, num_new)
        check(np.asarray(out), lengths, num_new)


def test_pages_in_any_passes():
    """Of an odd order, and one that is not there: a row's capacity ends at it."""
    cache, table = empty_cache(7, 1, PAGE, CONFIG.cache_dim), np.array([[3, 0, 6, -1], [5, 1, 2, -1]], np.int32)
    for lengths, num_new, rows in passes(WIDTHS):
        out, cache = ATTEND_PAGED(*rows, None, cache, table, lengths, num_new)
        check(np.asarray(out), lengths, num_new)


def test_chunks_of_prompts():
    """All at multiples of the chunk, on the accelerator."""
    rows_k, rows_v = (jnp.full((BATCH, 1, LENGTH, CONFIG.cache_dim), np.nan) for _ in range(2))
    for start in range(0, LENGTH, 10):
        rows = [a[:, start : start + 10] for a in TEXT]
        lengths, num_new = np.full(BATCH, start, np.int32), np.array([10, 10 if start < 20 else 0], np.int32)
        out, rows_k, rows_v = ATTEND_CHUNK(*rows, None, rows_k, rows_v, lengths, num_new)
        check(np.asarray(out), lengths, num_new)


@pytest.mark.parametrize("paged", [False, True])
def test_a_node_of_a_tree_chooses_among_its_ancestors(paged):
    """The text's next rows are nodes 0, 2 and 4 of a tree, among siblings with keys of their own."""
    lengths, num_new = np.full(BATCH, 20, np.int32), np.full(BATCH, 5, np.int32)
    rows, path = rows_of(9, 5), [0, 2, 4]
    for place, node in enumerate(path):
        for array, text in zip(rows, TEXT, strict=True):
            array[:, node] = text[:, 20 + place]
    tree = make_tree(np.array([[0, 0, 1, 2]] * BATCH, np.int32), 3)
    before, full = [a[:, :20] for a in TEXT], np.full(BATCH, 20, np.int32)
    if paged:
        cache, table = empty_cache(4, 1, PAGE, CONFIG.cache_dim), np.array([[3, 0], [1, 2]], np.int32)
        _, cache = ATTEND_PAGED(*before, None, cache, table, 0 * lengths, full)
        out, _ = ATTEND_PAGED(*rows, None, cache, table, lengths, num_new, tree)
    else:
        caches = [jnp.zeros((BATCH, 1, 32, CONFIG.cache_dim)) for _ in range(2)]
        _, *caches = ATTEND(*before, None, *caches, 0 * lengths, full)
        out, *_ = ATTEND(*rows, None, *caches, lengths, num_new, tree)
    check(np.asarray(out)[:, path], lengths, np.full(BATCH, 3))


def test_equal_scores_and_many_keys():
    """Blocks of keys score as one; of equal scores the earlier position is kept; what is not seen is not chosen."""
    rng, count = np.random.default_rng(2), 2 * indexer.BLOCK + 7
    asked, keys = rng.standard_normal((1, 3, 5, 7), np.float32), rng.standard_normal((1, count, 6), np.float32)
    keys[0, 700:] = keys[0, 400]
    behind_latent = np.pad(keys, ((0, 0), (0, 0), (8, 0)))
    seen = np.arange(count) <= np.array([2, 650, count])[:, None]
    places, there = indexer.chosen(CONFIG, jnp.asarray(asked), jnp.asarray(behind_latent), jnp.asarray(seen[None]))
    for query in range(3):
        scores = np.einsum("h,hs->s", asked[0, query, :, 6], np.maximum(asked[0, query, :, :6] @ keys[0].T, 0))
        scores = np.where(seen[query], scores, -np.inf)
        wanted = [s for s in np.argsort(-scores, kind="stable")[:4] if seen[query, s]]
        assert np.asarray(places)[0, query][np.asarray(there)[0, query]].tolist() == wanted


FIRST = dataclasses.replace(CONFIG, hands_on=True)
LATER = dataclasses.replace(CONFIG, indexer=None, taken=CONFIG.indexer.kept, hands_on=True)
LAST = dataclasses.replace(LATER, hands_on=False)
SEEN = jnp.broadcast_to(jnp.arange(LENGTH) <= jnp.arange(LENGTH)[:, None], (BATCH, LENGTH, LENGTH))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read(dtype):
    places = np.random.default_rng(0).integers(0, 1 << 20, (2, 3, 5))  # of the longest published window
    places[0, 0] = (0, 255, 256, 65535, 65536)
    there = np.arange(5) < np.array([5, 0, 2])[:, None]
    there = np.broadcast_to(there, places.shape)
    numbers = handed.written(jnp.asarray(places), jnp.asarray(there), 21).astype(dtype)
    found, held = map(np.asarray, handed.read(numbers))
    assert found.shape == held.shape == (2, 3, 7)  # two more than there were
    np.testing.assert_array_equal(held, np.pad(there, ((0, 0), (0, 0), (0, 2))))
    np.testing.assert_array_equal(found[held], places[there])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_goes_from_layer_to_layer_behind_the_hidden_state(dtype):
    """Three heads, which twelve numbers do not fill evenly where there are seven."""
    h = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, 7)), dtype)
    attended = reference_attention(FIRST, *map(jnp.asarray, TEXT)).astype(dtype)
    choice = indexer.chosen(CONFIG, indexer.asked_of(CONFIG, jnp.asarray(TEXT[0]))[1], jnp.asarray(TEXT[2])[:, :, 0], SEEN)
    wide = handed.behind(FIRST, h, attended, None)
    for config in (LATER, LATER, LAST):
        assert wide.shape == (BATCH, LENGTH, 7 + config.taken_numbers)
        own, taken = handed.apart(config, wide)
        np.testing.assert_array_equal(own, h)
        q = jnp.concatenate([jnp.zeros((BATCH, LENGTH, 3, config.head_dim), dtype), handed.by_heads(config, taken)], axis=-1)
        found = indexer.chosen(config, indexer.asked_of(config, q)[1], None, None)
        np.testing.assert_array_equal(indexer.mask(*found, LENGTH), indexer.mask(*choice, LENGTH))
        wide = handed.behind(config, own, None, taken)
    np.testing.assert_array_equal(wide, h)  # nothing goes behind the last one


def test_a_layer_that_takes_a_choice_attends_as_the_one_that_made_it():
    """Of the same queries, keys and values, with no index key behind them."""
    q, k, v = map(jnp.asarray, TEXT)
    first = reference_attention(FIRST, q, k, v)
    taken = first[..., FIRST.head_dim :].reshape(BATCH, LENGTH, -1)[..., : FIRST.told_numbers]
    q = jnp.concatenate([q[..., : FIRST.head_dim], handed.by_heads(LAST, taken)], axis=-1)
    np.testing.assert_allclose(reference_attention(LAST, q, k, v), first[..., : FIRST.head_dim], atol=TOLERANCE)
