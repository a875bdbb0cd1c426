"""Gated DeltaNet: passes of any size that replay what was committed give what the definition gives of the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.layer_config import Recurrence
from specmoe_jax.models import recurrent
from specmoe_jax.models.spec import RecurrentWeights
from specmoe_jax.speculate.trees import make_tree
from specmoe_jax.types import RecurrentState

CONFIG = Recurrence(key_heads=2, value_heads=4, key=3, value=5, taps=4)
BATCH, LENGTH, REPLAYED = 3, 30, 4
TOLERANCE = 2e-5  # float32; sums of up to LENGTH products in another order

WEIGHTS = RecurrentWeights(
    z=None, b=None, a=None, decay=None, step=None, norm=None,
    conv=jnp.asarray(np.random.default_rng(0).standard_normal((CONFIG.channels, 1, CONFIG.taps)), jnp.float32),
)  # fmt: skip


def rows_of(seed: int, count: int):
    """Channels, gates and rates of `count` positions of every sequence."""
    rng = np.random.default_rng(seed)
    channels = rng.standard_normal((BATCH, count, CONFIG.channels), np.float32)
    z = np.zeros((BATCH, count, CONFIG.value_heads, CONFIG.value), np.float32)
    rates = np.stack([rng.random((BATCH, count, 4)), -2 * rng.random((BATCH, count, 4))], axis=2).astype(np.float32)
    return channels, z, rates


TEXT = rows_of(1, LENGTH)
EXPECTED = np.asarray(recurrent.reference(CONFIG, WEIGHTS, *TEXT))[..., : CONFIG.value]
_recur = jax.jit(lambda *a: recurrent.recur(CONFIG, WEIGHTS, *a))


def junk_cache() -> RecurrentState:
    """As another sequence left it: a pass at position 0 must not see it."""
    kept = CONFIG.kept_rows(REPLAYED)
    return RecurrentState(
        state=jnp.full((BATCH, 4, 3, 5), jnp.nan),
        start=jnp.full(BATCH, 7, jnp.int32),
        rows=jnp.full((BATCH, kept, CONFIG.row), jnp.nan),
    )


def with_wrong(lengths, right, width: int, seed: int):
    """`width` rows from each length on: the text's for the first right[b] of them, others behind."""
    index = np.minimum(lengths[:, None] + np.arange(width), LENGTH - 1)
    text = [np.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis=1) for a in TEXT]
    keep = np.arange(width) < right[:, None]
    return [
        np.where(keep.reshape(*keep.shape, *(1,) * (a.ndim - 2)), a, b) for a, b in zip(text, rows_of(seed, width), strict=True)
    ]


def check(outputs, lengths, count):
    for row in range(BATCH):
        expected = EXPECTED[row, lengths[row] : lengths[row] + count[row]]
        np.testing.assert_allclose(outputs[row, : count[row], :, : CONFIG.value], expected, atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_passes_with_any_acceptance_give_the_definition(data):
    """Ragged prompts in chunks; then steps of a draft that runs through the same cache, token by token, and a verification."""
    cache, lengths = junk_cache(), np.zeros(BATCH, np.int32)
    prompts = np.array(data.draw(st.lists(st.integers(0, 14), min_size=BATCH, max_size=BATCH)), np.int32)
    for start in range(0, prompts.max(initial=0), 5):
        num_new = np.clip(prompts - start, 0, 5).astype(np.int32)
        first = np.minimum(prompts, start).astype(np.int32)
        outputs, cache = _recur(*with_wrong(first, num_new, 5, 0), cache, first, num_new)
        check(outputs, first, num_new)
    lengths = prompts
    for step in range(data.draw(st.integers(1, 4))):
        active = np.array(data.draw(st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))) & (lengths + REPLAYED + 1 < LENGTH)
        right = np.array(data.draw(st.lists(st.integers(1, REPLAYED + 1), min_size=BATCH, max_size=BATCH)), np.int32)
        for position in range(data.draw(st.integers(0, REPLAYED))):
            piece = with_wrong(lengths + position, right - position, 1, 10 * step + position)
            outputs, cache = _recur(*piece, cache, lengths + position, active.astype(np.int32))
        num_new = np.where(active, REPLAYED + 1, 0).astype(np.int32)
        outputs, cache = _recur(*with_wrong(lengths, right, REPLAYED + 1, 100 + step), cache, lengths, num_new)
        check(outputs, lengths, np.where(active, right, 0))
        lengths = (lengths + np.where(active, right, 0)).astype(np.int32)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(0, 99))
def test_trees(depths, seed):
    """The text's next rows stand in a tree of four nodes behind the root, among others; two trees one after the other."""
    rng = np.random.default_rng(seed)
    lengths = np.array([0, 3, 6], np.int32)
    outputs, cache = _recur(*with_wrong(np.zeros(BATCH, np.int32), lengths, 6, 0), junk_cache(), np.zeros(BATCH, np.int32), lengths)
    for _ in range(2):
        rows, parents, path = with_wrong(lengths, np.ones(BATCH, np.int32), 5, seed), np.zeros((BATCH, 4), np.int32), []
        for row, depth in enumerate(depths):
            own = sorted(rng.choice(np.arange(1, 5), depth, replace=False).tolist())
            on_path = [0, *own]
            for node in range(1, 5):
                parents[row, node - 1] = on_path[own.index(node)] if node in own else rng.integers(0, node)
            path.append((own + [0] * 4)[:4])
            for place, node in enumerate(own):
                for array, text in zip(rows, TEXT, strict=True):
                    array[row, node] = text[row, lengths[row] + 1 + place]
        tree = make_tree(parents, 4)
        outputs, cache = _recur(*rows, cache, lengths, np.full(BATCH, 5, np.int32), tree)
        order = np.pad(np.array(path), ((0, 0), (1, 0)))
        on_path = np.take_along_axis(np.asarray(outputs), order[..., None, None], axis=1)
        check(on_path, lengths, np.array(depths) + 1)
        cache = recurrent.keep_path(cache, jnp.asarray(lengths), jnp.array(path, jnp.int32), jnp.array(depths, jnp.int32))
        lengths = (lengths + np.array(depths) + 1).astype(np.int32)


def test_long_passes_go_chunk_by_chunk():
    """More rows than a chunk, and states of some rows of a larger cache."""
    count = 2 * recurrent.CHUNK + 3
    many = rows_of(5, count)
    expected = recurrent.reference(CONFIG, WEIGHTS, *many)
    cache = jax.tree.map(lambda a: jnp.concatenate([a, a]), junk_cache())
    rows, zeros = np.array([4, 1, 2], np.int32), np.zeros(BATCH, np.int32)
    first, second = ([a[:, some] for a in many] for some in (slice(0, count - 3), slice(count - 3, None)))
    outputs, cache = recurrent.recur_rows(CONFIG, WEIGHTS, *first, cache, rows, zeros, zeros + count - 3)
    np.testing.assert_allclose(outputs, expected[:, : count - 3], atol=TOLERANCE, rtol=TOLERANCE)
    outputs, after = recurrent.recur_rows(CONFIG, WEIGHTS, *second, cache, rows, zeros + count - 3, zeros + 3)
    np.testing.assert_allclose(outputs, expected[:, count - 3 :], atol=TOLERANCE, rtol=TOLERANCE)
    outputs, untouched = recurrent.recur_rows(CONFIG, WEIGHTS, *second, after, np.array([-1, 3, 0]), zeros + 4, zeros)
    for a, b in zip(after, untouched, strict=True):
        np.testing.assert_array_equal(a, b)
