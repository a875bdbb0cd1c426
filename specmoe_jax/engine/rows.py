"""The rows of a batch over several devices: each attends to its own rows, and all have what the routed experts take.

Programs have an argument `split`: the mesh over whose devices the rows are divided, None where every device has all of them (one
device; rows that are no multiple of the devices; a cache in host memory). How a cache was made (runtime.new_cache) decides it, and
everything else follows the cache: between two layers the hidden states [B, T, M] are divided as it is.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax

from specmoe_jax.kv_cache.rows import rows_of_device
from specmoe_jax.support.processes import in_order
from specmoe_jax.types import MESH_AXIS, Place

T = TypeVar("T")
Split: TypeAlias = jax.sharding.Mesh | None

WHOLE, OWN = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(MESH_AXIS)


def place_of_rows(place: Place, rows: int) -> Place:
    """Where arrays [B, ...] of so many rows are, of a place that may be several devices."""
    if not isinstance(place, jax.sharding.NamedSharding) or rows_of_device(rows, place.mesh.size) == rows:
        return place
    return jax.sharding.NamedSharding(place.mesh, OWN, memory_kind=place.memory_kind)


def split_of(arrays: Any) -> Split:
    """How the rows of arrays [B, ...] are divided; the first tells it of all, None where there is none."""
    sharding = getattr(next(iter(jax.tree.leaves(arrays)), None), "sharding", None)  # numpy's arrays have none
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.is_fully_replicated:
        return None
    assert isinstance(sharding.mesh, jax.sharding.Mesh)  # of devices, as every array's
    return sharding.mesh


def over_rows(split: jax.sharding.Mesh, program: Callable, whole: tuple, own: tuple, out: Any) -> Any:
    """program(*whole, *own) on every device, of `own` with its rows alone. out: WHOLE or OWN of what it gives."""
    specs = (*[WHOLE] * len(whole), *[OWN] * len(own))
    return jax.shard_map(program, mesh=split, in_specs=specs, out_specs=out, check_vma=False)(*whole, *own)


def of_all(arrays: T) -> T:
    """Inside such a program: arrays [n, ...] of this device's rows as those of all rows."""
    return jax.tree.map(lambda array: jax.lax.all_gather(array, MESH_AXIS, tiled=True), arrays)


def first_row(own: int) -> jax.Array:
    """Inside such a program: of this device's `own` rows the first one's number."""
    return jax.lax.axis_index(MESH_AXIS) * own


def constrained(arrays: T, split: Split, spec: jax.sharding.PartitionSpec) -> T:
    """Inside a program of all devices: its results as OWN or WHOLE says, and not as XLA may think best."""
    return arrays if split is None else jax.lax.with_sharding_constraint(arrays, jax.sharding.NamedSharding(split, spec))


def gathered(array: jax.Array) -> jax.Array:
    """An array [B, ...] between two programs, all rows of it on every device."""
    split = split_of(array)
    return array if split is None else _gathered(array, split=split)


@in_order
@functools.partial(jax.jit, static_argnames="split")
def _gathered(array: jax.Array, *, split: jax.sharding.Mesh) -> jax.Array:
    with jax.named_scope("gathered"):
        return constrained(array, split, WHOLE)


class split_like:
    """A program whose `split` is that of one of its arguments, which is never traced itself."""

    def __init__(self, argument: int):
        self._argument = argument

    def __call__(self, program: Callable) -> Callable:
        @functools.wraps(program)
        def call(*args, **kwargs):
            return program(*args, **kwargs, split=split_of(args[self._argument]))

        return call
