"""Gated DeltaNet layers (Yang et al. 2024): a state of fixed size that every position decays, reads and corrects.

S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q, for each value head. A state cannot be cut to a length as a cache can.
So what is kept is the state at an earlier position, and beside it the rows of the positions since then, before their
convolution: a pass first replays those that were committed. A rejected position was never in the state, and nothing of it is
projected again. How many rows: as many as may be rolled back. Replay costs little, because the rule is computed chunk by
chunk (its WY form), which reads and writes the state once however many rows there are; a state for each position of a pass
would be written for each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import LayerConfig, Recurrence
from specmoe_jax.models.basics import linears, rms_norm
from specmoe_jax.models.spec import LayerWeights, RecurrentWeights
from specmoe_jax.types import RecurrentState, Tree

CHUNK = 64  # rows of one step of the rule: its triangular system grows with their square
NORM_EPS = 1e-6  # of queries and keys (transformers' constant)


class _Rows(NamedTuple):
    """Rows of the rule in float32. q, k: [B, J, Hk, Dk], normed; v: [B, J, Hk, each, Dv]; beta, decay: [B, J, Hk, each]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    decay: jax.Array


def project(config: Recurrence, weights: LayerWeights[jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, M], normed -> channels [B, T, C] before their convolution, z [B, T, Hv, Dv] and rates [B, T, 2, Hv] float32.

    rates: beta, and the logarithm of the decay.
    """
    own = weights.recurrent
    assert own is not None
    if config.by_key_head:
        channels, z, b, a = _by_key_head(config, *linears(x, weights.q, own.b))
    else:
        assert own.z is not None and own.a is not None
        channels, z, b, a = linears(x, weights.q, own.z, own.b, own.a)
    beta = jax.nn.sigmoid(b).astype(jnp.float32)
    decay = -jnp.exp(own.decay) * jax.nn.softplus(a.astype(jnp.float32) + own.step)
    return channels, z.reshape(*x.shape[:2], config.value_heads, config.value), jnp.stack([beta, decay], axis=2)


def _by_key_head(config: Recurrence, qkvz: jax.Array, ba: jax.Array) -> tuple[jax.Array, ...]:
    """Qwen3-Next's order of rows, key head by key head -> channels, z, b, a in the order of their heads."""
    batch, each = qkvz.shape[:2], config.value_heads // config.key_heads
    ends = (config.key, 2 * config.key, 2 * config.key + each * config.value)
    q, k, v, z = jnp.split(qkvz.reshape(*batch, config.key_heads, -1), ends, axis=-1)
    b, a = jnp.split(ba.reshape(*batch, config.key_heads, -1), 2, axis=-1)
    flat = [part.reshape(*batch, -1) for part in (q, k, v, z, b, a)]
    return jnp.concatenate(flat[:3], axis=-1), *flat[3:]


def values(config: LayerConfig, weights: LayerWeights[jax.Array], outputs: jax.Array) -> jax.Array:
    """Outputs of the rule beside their gates [B, T, Hv, 2 Dv] -> normed and gated [B, T, Hv, Dv]."""
    assert weights.recurrent is not None
    o, z = jnp.split(outputs, 2, axis=-1)
    normed = rms_norm(o, weights.recurrent.norm.astype(o.dtype), config.norm_eps)
    return (normed * jax.nn.silu(z.astype(jnp.float32))).astype(outputs.dtype)


def recur(
    config: Recurrence,
    weights: RecurrentWeights[jax.Array],
    channels: jax.Array,
    z: jax.Array,
    rates: jax.Array,
    cache: RecurrentState,
    lengths: jax.Array,
    num_new: jax.Array,
    tree: Tree | None = None,
) -> tuple[jax.Array, RecurrentState]:
    """The rule over new rows at positions lengths[b] + t; t >= num_new[b] is padding. -> as `values` takes them, and the cache.

    A pass at position 0 begins a sequence, whatever was there before. tree: of the new rows, which stand in the order of its
    nodes.
    """
    width, kept = config.taps - 1, cache.rows.shape[1]
    active = num_new > 0
    begins = active & (lengths == 0)
    start, end = jnp.where(begins, 0, cache.start), lengths + num_new
    new = jnp.concatenate([channels.astype(jnp.float32), rates.reshape(*rates.shape[:2], -1)], axis=-1)  # [B, T, row]
    places = start[:, None] - width + jnp.arange(kept + new.shape[1], dtype=jnp.int32)  # of kept and new rows, in one
    node = places - lengths[:, None]  # of each its place among the new rows; negative for kept ones
    rows = jnp.where((node < 0)[..., None], _take(cache.rows, places % kept), _take(new, node))
    rows = jnp.where((places < 0)[..., None], 0.0, rows)
    mixed = _convolved(config, weights.conv, rows[..., : config.channels], node, tree)
    replayed = slice(width, None)
    valid = (places[:, replayed] < end[:, None])[..., None]
    rows_of = _split(config, mixed, jnp.where(valid, rows[:, replayed, config.channels :], 0.0))
    moved = jnp.where(active, jnp.maximum(start, end - (kept - width)), start)  # what is before it can be rolled back no more
    seen = None if tree is None else _seen(node[:, replayed], tree)
    outputs, state = _rule(config, rows_of, cache.state, begins, moved - start, seen)
    outputs = _take(outputs.reshape(*outputs.shape[:2], -1), lengths[:, None] - start[:, None] + jnp.arange(new.shape[1]))
    slots = jnp.arange(kept, dtype=jnp.int32)
    last = end[:, None] - 1 - (end[:, None] - 1 - slots) % kept  # the latest position that belongs into each slot
    rows = jnp.where(active[:, None, None], _take(rows, last - places[:, :1]), cache.rows)
    outputs = jnp.concatenate([outputs.reshape(z.shape).astype(z.dtype), z], axis=-1)
    return outputs, RecurrentState(state=state, start=jnp.where(active, moved, cache.start), rows=rows)


def recur_rows(config: Recurrence, weights, channels, z, rates, cache: RecurrentState, rows, lengths, num_new, tree=None):
    """`recur` of b sequences whose states are rows [b] int32 of a cache of B; -1 is padding."""
    held = len(cache.start)
    own = jax.tree.map(lambda a: a[jnp.clip(rows, 0)], cache)
    outputs, own = recur(config, weights, channels, z, rates, own, lengths, num_new, tree)
    places = jnp.where(rows < 0, held, rows)
    return outputs, jax.tree.map(lambda a, new: a.at[places].set(new, mode="drop"), cache, own)


def keep_path(cache: RecurrentState, lengths: jax.Array, path: jax.Array, num_accepted: jax.Array) -> RecurrentState:
    """Moves the rows of a tree's accepted nodes together, right after the root's. path [B, depth], num_accepted [B]."""
    kept, count = cache.rows.shape[1], jnp.arange(path.shape[1])
    accepted = _take(cache.rows, (lengths[:, None] + path) % kept)
    places = jnp.where(count < num_accepted[:, None], (lengths[:, None] + 1 + count) % kept, kept)
    batch = jnp.arange(len(path))[:, None]
    return cache._replace(rows=cache.rows.at[batch, places].set(accepted, mode="drop"))


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows [B, n, X] at index [B, m], held within 0..n-1."""
    return jnp.take_along_axis(rows, jnp.clip(index, 0, rows.shape[1] - 1)[..., None], axis=1)


def _convolved(config: Recurrence, kernel: jax.Array, rows: jax.Array, node: jax.Array, tree: Tree | None) -> jax.Array:
    """Each row but the first taps - 1 with those before it: [B, n, C] -> [B, n - taps + 1, C]. Before a node is its parent."""
    kernel, width, mixed = kernel[:, 0].astype(jnp.float32), config.taps - 1, 0.0
    if tree is None:
        count = rows.shape[1] - width
        return jax.nn.silu(sum(kernel[:, tap] * rows[:, tap : tap + count] for tap in range(config.taps)))
    own = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])
    before = jnp.where(node > 0, own - node + _take(tree.parents[..., None], node)[..., 0], own - 1)
    for tap in reversed(range(config.taps)):
        mixed = mixed + kernel[:, tap] * _take(rows, own)
        own = jnp.take_along_axis(before, jnp.maximum(own, 0), axis=1)
    return jax.nn.silu(mixed)[:, width:]


def _split(config: Recurrence, mixed: jax.Array, rates: jax.Array) -> _Rows:
    """Convolved channels [B, J, C] and rates [B, J, 2 Hv] by heads."""
    keys, grouped = config.key_heads * config.key, (*mixed.shape[:2], config.key_heads)
    q, k, v = jnp.split(mixed, (keys, 2 * keys), axis=-1)
    q, k = (_unit(a.reshape(*grouped, config.key)) for a in (q, k))
    beta, decay = (a.reshape(*grouped, -1) for a in jnp.split(rates, 2, axis=-1))
    return _Rows(q * config.key**-0.5, k, v.reshape(*grouped, -1, config.value), beta, decay)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPS)


def _seen(node: jax.Array, tree: Tree) -> jax.Array:
    """[B, J, J] bool: the rows that each row follows, itself among them."""
    seen, last = _chain(node.shape[1]), tree.mask.shape[1] - 1
    mask = jnp.take_along_axis(tree.mask, jnp.clip(node, 0, last)[:, :, None], axis=1)
    mask = jnp.take_along_axis(mask, jnp.clip(node, 0, last)[:, None], axis=2)
    return jnp.where((node >= 0)[:, :, None] & (node >= 0)[:, None], mask & seen, seen)


def _chain(count: int) -> jax.Array:
    """[1, count, count] bool."""
    return jnp.tril(jnp.ones((1, count, count), bool))


def _rule(
    config: Recurrence, rows: _Rows, state: jax.Array, begins: jax.Array, count: jax.Array, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """-> outputs [B, J, Hk, each, Dv] of all rows, and the state [B, Hv, Dk, Dv] after the first count[b] of them.

    begins: [B] bool, rows of which the state is to be taken as zeros. seen: of a tree, which is short and goes in one chunk.
    """
    batch, total = rows.beta.shape[:2]
    grouped = state.reshape(batch, config.key_heads, -1, config.key, config.value)
    if total <= CHUNK or seen is not None:
        outputs, _, after = _chunk(rows, grouped, begins, count, _chain(total) if seen is None else seen)
        return outputs, after.reshape(state.shape)
    chunks = -(-total // CHUNK)
    missing = chunks * CHUNK - total

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, missing), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(batch, chunks, CHUNK, *a.shape[2:]).swapaxes(0, 1)

    def one(carry, chunk):
        state, kept = carry
        first, own = chunk
        outputs, state, after = _chunk(own, state, begins & (first == 0), jnp.clip(count - first, 0, CHUNK), _chain(CHUNK))
        return (state, jnp.where((count > first)[:, None, None, None, None], after, kept)), outputs

    carry, outputs = jax.lax.scan(one, (grouped, grouped), (jnp.arange(chunks) * CHUNK, _Rows(*map(cut, rows))))
    outputs = outputs.swapaxes(0, 1)
    return outputs.reshape(batch, chunks * CHUNK, *outputs.shape[3:])[:, :total], carry[1].reshape(state.shape)


def _chunk(
    rows: _Rows, state: jax.Array, begins: jax.Array, count: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rule's WY form. state [B, Hk, each, Dk, Dv] -> outputs, the state after all rows, and after the first count[b].

    begins: [B] bool, whether the state counts as zeros; what is read of it is dropped, so that no pass over it is spent on that.
    Letters: h key heads, e value heads of each, i and j rows, d of keys, f of values.
    """
    follows = jnp.broadcast_to(seen, (len(count), *seen.shape[1:])).astype(jnp.float32)
    along = jnp.einsum("bij,bjhe->bhei", follows, rows.decay, precision="highest")  # logarithms, [B, Hk, each, J]
    between = jnp.exp(jnp.where(seen[:, None, None], along[..., None] - along[..., None, :], -jnp.inf))
    beta = rows.beta.transpose(0, 2, 3, 1)  # [B, Hk, each, J]
    both = jnp.concatenate([rows.k, rows.q], axis=1)  # one product, so that the state is read once
    read = jnp.exp(jnp.tile(along, 2))[..., None] * jnp.einsum("bihd,bhedf->bheif", both, state, precision="highest")
    known, asked = jnp.split(jnp.where(begins[:, None, None, None, None], 0.0, read), 2, axis=3)
    keys, scores = jnp.split(jnp.einsum("bihd,bjhd->bhij", both, rows.k, precision="highest")[:, :, None], 2, axis=3)
    missing = beta[..., None] * (rows.v.transpose(0, 2, 3, 1, 4) - known)
    # The diagonal of the system is not read.
    system = beta[..., None] * keys * between
    written = jax.scipy.linalg.solve_triangular(system, missing, lower=True, unit_diagonal=True)  # [B, Hk, each, J, Dv]
    outputs = asked + jnp.einsum("bheij,bhejf->bheif", scores * between, written, precision="highest")

    def after(some: jax.Array) -> jax.Array:
        """The state after the first some[b] rows, which are a chain; as it was, bit for bit, after none."""
        place = jnp.arange(along.shape[-1])
        total = jnp.where(some[:, None, None] > 0, _take_last(along, some), 0.0)
        weight = jnp.where(place < some[:, None, None, None], jnp.exp(total[..., None] - along), 0.0)
        added = jnp.einsum("bjhd,bhej,bhejf->bhedf", rows.k, weight, written, precision="highest")
        before = jnp.where(begins[:, None, None, None, None], 0.0, state)
        return jnp.exp(total)[..., None, None] * before + added

    return outputs.transpose(0, 3, 1, 2, 4), after(jnp.full_like(count, along.shape[-1])), after(count)


def _take_last(along: jax.Array, count: jax.Array) -> jax.Array:
    """along [B, Hk, each, J] at row count[b] - 1."""
    place = jnp.broadcast_to(jnp.maximum(count - 1, 0)[:, None, None, None], (*along.shape[:3], 1))
    return jnp.take_along_axis(along, place, axis=-1)[..., 0]


def reference(config: Recurrence, weights: RecurrentWeights[jax.Array], channels, z, rates) -> jax.Array:
    """The definition, position by position over whole sequences. -> as `recur`."""
    channels = channels.astype(jnp.float32)
    shifted = (jnp.pad(channels, ((0, 0), (back, 0), (0, 0)))[:, : channels.shape[1]] for back in reversed(range(config.taps)))
    mixed = sum(x * tap for x, tap in zip(shifted, jnp.moveaxis(weights.conv[:, 0], 1, 0), strict=True))
    rows = _split(config, jax.nn.silu(mixed), rates.reshape(*rates.shape[:2], -1))
    each = config.value_heads // config.key_heads
    state = jnp.zeros((len(z), config.key_heads, each, config.key, config.value))

    def one(state, row: _Rows):
        state = jnp.exp(row.decay)[..., None, None] * state
        known = jnp.einsum("bhd,bhedf->bhef", row.k, state, precision="highest")
        state = state + jnp.einsum("bhd,bhef->bhedf", row.k, row.beta[..., None] * (row.v - known), precision="highest")
        return state, jnp.einsum("bhd,bhedf->bhef", row.q, state, precision="highest")

    _, outputs = jax.lax.scan(one, state, jax.tree.map(lambda a: a.swapaxes(0, 1), rows))
    return jnp.concatenate([outputs.swapaxes(0, 1).reshape(z.shape).astype(z.dtype), z], axis=-1)
