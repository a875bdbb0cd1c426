"""Which of several accelerators an expert belongs to. Pure.

Expert e of every layer belongs to device e mod n, which alone fetches, holds and computes it. The slots of a pool are numbered
through all devices: device d has the d-th of n equal parts. With one device every expert and every slot is its own.
"""

from collections.abc import Sequence

import numpy as np

from specmoe_jax.types import Device


def home(expert: int, devices: Sequence[Device]) -> Device | None:
    """The device of an expert; None where there is only the first."""
    return devices[expert % len(devices)] if devices else None


def own_experts(device: int, devices: int, num_experts: int) -> range:
    """Of a layer, in the order of a device's slots."""
    return range(device, num_experts, devices)


def most_of_process(processes: int, devices: int, num_experts: int) -> int:
    """Of a layer, in the host memory of the process that has most: `devices` are those of all, as many of each in their order."""
    own = devices // processes
    return max(
        sum(len(own_experts(process * own + device, devices, num_experts)) for device in range(own)) for process in range(processes)
    )


def most_experts(devices: int, num_experts: int) -> int:
    """Of a layer, on the device that has most."""
    return -(-num_experts // devices)


def whole_slots(num_layers: int, devices: int, num_experts: int) -> np.ndarray:
    """[L, E] int32, the slots of experts where these layers are all that a pool holds: each device's own in their order."""
    experts = np.arange(num_experts, dtype=np.int32)
    homes, layers = experts % devices, np.arange(num_layers, dtype=np.int32)[:, None]
    held = np.bincount(homes, minlength=devices)[homes]  # of each layer, where this expert is
    return (homes * num_layers * most_experts(devices, num_experts) + layers * held + experts // devices).astype(np.int32)
