"""Programs over the rows of a cache: all as one of them, some as a cache of their own and back, a tree's accepted path together."""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.engine.rows import OWN, WHOLE, Split, first_row, over_rows, split_like
from specmoe_jax.models import recurrent
from specmoe_jax.ops import PackedCache, packed
from specmoe_jax.support.processes import in_order
from specmoe_jax.types import MESH_AXIS, RecurrentState


@split_like(0)
@in_order
@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def spread_row(cache, row: jax.Array, *, split: Split = None):
    """All rows of a cache [B, K, S, D] or of a RecurrentState (donated) as one of them."""

    def spread(row: jax.Array, cache):
        return jax.tree.map(lambda held: jnp.broadcast_to(_taken(held, row, split), held.shape), cache)

    with jax.named_scope("spread_row"):
        return spread(row, cache) if split is None else over_rows(split, spread, (row,), (cache,), OWN)


@split_like(0)
@in_order
@functools.partial(jax.jit, static_argnames="split")
def take_rows(cache, rows: jax.Array, *, split: Split = None):
    """Some rows [b] of a layer's cache [B, ...] as one of their own [b, ...]; it may be several arrays.

    Divided as the cache is, if there are as many for each device.
    """
    if split is None:
        with jax.named_scope("take_rows"):
            return jax.tree.map(lambda array: array[rows], cache)
    out = WHOLE if len(rows) % split.size else OWN

    def take(rows: jax.Array, cache):
        taken = jax.tree.map(lambda array: _taken(array, rows, split), cache)
        return taken if out == WHOLE else jax.tree.map(lambda array: _own(array, len(rows) // split.size), taken)

    with jax.named_scope("take_rows"):
        return over_rows(split, take, (rows,), (cache,), out)


@split_like(0)
@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def put_rows(cache, some, rows: jax.Array, *, split: Split = None):
    """A cache [B, ...] (donated) with `some` [b, ...], whole on every device, in the rows [b]; a row of B is padding."""

    def put(array: jax.Array, new: jax.Array, rows: jax.Array) -> jax.Array:
        if split is not None:  # those of other devices are padding
            rows = rows - first_row(len(array))
        return ops.put_rows(array, new, rows.astype(jnp.int32))

    def put_own(some, rows: jax.Array, cache):
        return jax.tree.map(functools.partial(put, rows=rows), cache, some)

    with jax.named_scope("put_rows"):
        return put_own(some, rows, cache) if split is None else over_rows(split, put_own, (some, rows), (cache,), OWN)


def _taken(array: jax.Array, rows: jax.Array, split: Split) -> jax.Array:
    """array[rows] of an array [B, ...], of which a device may have its own rows alone: the others add zeros."""
    if split is None:
        return array[rows]
    here = rows - first_row(len(array))
    mine = (here >= 0) & (here < len(array))
    taken = array[jnp.clip(here, 0, len(array) - 1)]
    return jax.lax.psum(jnp.where(mine.reshape(*mine.shape, *[1] * (array.ndim - 1)), taken, 0), MESH_AXIS)


def _own(array: jax.Array, own: int) -> jax.Array:
    """A device's own of the rows of an array that each has whole."""
    return jax.lax.dynamic_slice_in_dim(array, first_row(own), own)


@split_like(0)
@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def keep_path(cache, lengths: jax.Array, path: jax.Array, num_accepted: jax.Array, *, split: Split = None):
    """Moves the rows of a tree's accepted nodes together, right after the root's. cache [B, K, S, D] or a recurrent one, donated.

    path [B, depth], num_accepted [B]: see AcceptedPath. Siblings are left behind and overwritten by the next pass.
    """
    given = (cache, lengths, path, num_accepted)
    with jax.named_scope("keep_path"):
        return _keep_path(*given) if split is None else over_rows(split, _keep_path, (), given, OWN)


def _keep_path(cache, lengths: jax.Array, path: jax.Array, num_accepted: jax.Array):
    if isinstance(cache, RecurrentState):
        return recurrent.keep_path(cache, lengths, path, num_accepted)
    rows = jnp.take_along_axis(cache, (lengths[:, None] + path)[:, None, :, None], axis=2)  # [B, K, depth, D]
    return ops.append(cache, rows.swapaxes(1, 2), lengths + 1, num_accepted)


@functools.partial(jax.jit, donate_argnums=0)
def keep_path_paged(
    cache: PackedCache, table: jax.Array, lengths: jax.Array, path: jax.Array, num_accepted: jax.Array
) -> PackedCache:
    """As `keep_path`, in a paged cache (donated); table [B, P] int32: the pages of each row."""
    with jax.named_scope("keep_path_paged"):
        places = lengths[:, None] + 1 + jnp.arange(path.shape[1])
        moved = jnp.arange(path.shape[1]) < num_accepted[:, None]
        return packed.move(cache, table, lengths[:, None] + path, places, moved)
