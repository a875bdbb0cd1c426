"""Several processes that run one engine (`jax.distributed`): whose devices are whose, and arrays that all of them hold.

Every process runs the same programs in the same order. What is on "the accelerator" is on the devices of all processes then,
each of which can look at its own copy alone.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    return jax.process_count() > 1


def chosen_devices(count: int) -> tuple[Any, ...]:
    """So many devices, as many of each process, in the order of processes; a single one is this process's own."""
    if count == 1 or not several():
        return tuple(jax.local_devices()[:count])
    each = count // jax.process_count()
    own = [[d for d in jax.devices() if d.process_index == process][:each] for process in range(jax.process_count())]
    return tuple(device for devices in own for device in devices)


def is_local(device: Any) -> bool:
    """Whether a device is this process's; None is the first one's name."""
    return device is None or device.process_index == jax.process_index()


def local(arrays: Any) -> Any:
    """Arrays that every device holds, as this process's own copies; others as they are."""
    return jax.tree.map(_own_copy, arrays) if several() else arrays


def _own_copy(array: Any) -> Any:
    return array if not isinstance(array, jax.Array) or array.is_fully_addressable else array.addressable_data(0)


def put(arrays: Any, place: Any) -> Any:
    """`jax.device_put` to a place that may be devices of several processes, each of which has the same arrays.

    JAX's own compares the values of all processes then, a message to each for every array.
    """
    if not several():
        return jax.device_put(arrays, place)
    if not isinstance(place, jax.sharding.Sharding) or place.is_fully_addressable:
        return jax.device_put(local(arrays), place)
    own = [jax.sharding.SingleDeviceSharding(d, memory_kind=place.memory_kind) for d in place.mesh.local_devices]  # pyright: ignore

    def everywhere(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, place)
        copies = [jax.device_put(array, one) for one in own]
        return jax.make_array_from_single_device_arrays(copies[0].shape, place, copies)

    return jax.tree.map(everywhere, arrays)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def differing(contents: dict[str, bytes]) -> list[str]:
    """The names of what is not the same in all processes."""
    if not several():
        return []
    own = np.stack([np.frombuffer(hashlib.sha256(content).digest(), np.uint8) for content in contents.values()])
    every = np.asarray(multihost_utils.process_allgather(own))  # [processes, names, 32]
    return [name for name, digests in zip(contents, every.swapaxes(0, 1), strict=True) if (digests != digests[0]).any()]


def agreed(value: float) -> float:
    """Process 0's value in all of them: what a clock said, on which a decision rests."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(value))) if several() else value


def agreed_bytes(content: bytes) -> bytes:
    """Process 0's in all of them."""
    if not several():
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content, np.uint8) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes()


class in_order:
    """A program that processes exchange data in: on CPUs (gloo) it has ended before the next one begins.

    Programs that do not depend on each other may else run in another order in each process, whose messages would be
    mistaken for each other's; an accelerator has one stream. Waiting also leaves threads for all devices of a process.
    """

    def __init__(self, program: Callable):
        self._program = program
        functools.update_wrapper(self, program)

    def __call__(self, *args, **kwargs) -> Any:
        done = self._program(*args, **kwargs)
        return jax.block_until_ready(done) if several() and jax.local_devices()[0].platform == "cpu" else done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)
