"""Which of several accelerators an expert belongs to. Pure.

`homes_of` makes the one table: of each expert of each layer the device that alone fetches, holds and computes it. Whatever the
placement, none has more experts of a layer than `most_experts`. The slots of a pool are numbered through all devices: device d has
the d-th of n equal parts. With one device every expert and every slot is its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.types import Device


class Placement(NamedTuple):
    """homes: (loads [L, E], devices) -> [L, E] int32. by_popularity: the loads matter to it, so they have to be known."""

    homes: Callable[[np.ndarray, int], np.ndarray]
    by_popularity: bool


def modulo(loads: np.ndarray, devices: int) -> np.ndarray:
    """Expert e of every layer belongs to device e mod n."""
    return np.broadcast_to(np.arange(loads.shape[1], dtype=np.int32) % devices, loads.shape)


def evenly(loads: np.ndarray, devices: int) -> np.ndarray:
    """The heaviest expert first, each to the device with the least load of its layer so far (Graham 1969, LPT).

    Deviation: no device gets more than its share of a layer's experts, so the account is that of any placement; where a layer
    leaves the choice, the device that has least of the layers before.
    """
    homes, totals, most = np.empty(loads.shape, np.int32), np.zeros(devices), most_experts(devices, loads.shape[1])
    for layer, own in enumerate(loads):
        sums, counts = np.zeros(devices), np.zeros(devices, np.int64)
        for expert in np.argsort(-own, kind="stable"):
            device = min(np.flatnonzero(counts < most), key=lambda d: (sums[d], totals[d] + sums[d], counts[d]))
            homes[layer, expert] = device
            sums[device] += own[expert]
            counts[device] += 1
        totals += sums
    return homes


MODULO = Placement(modulo, by_popularity=False)
POPULARITY = Placement(evenly, by_popularity=True)


def homes_of(shape: tuple[int, int], devices: int, placement: Placement = MODULO, loads: np.ndarray | None = None) -> np.ndarray:
    """[L, E] int32. shape: L, E, of all layers with experts. loads: of the first ones, as of `loads_of`; others are all alike."""
    all_loads = np.ones(shape)
    if loads is not None:
        all_loads[: len(loads)] = loads
    return placement.homes(all_loads, devices)


def loads_of(counts: np.ndarray, per_token: int, tokens: float) -> np.ndarray:
    """[L, E], the probability that a pass over so many tokens needs an expert: it is brought once, however many choose it.

    counts: [L, E], how often each was chosen. per_token: choices of a token, which are of different experts. Of experts that every
    pass needs the more popular one is heavier by a hair: a draft keeps them, so they have to be spread among themselves, too.
    """
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.where(sums, counts / np.maximum(sums, 1), 1 / counts.shape[1])
    return 1 - (1 - np.minimum(per_token * shares, 1.0)) ** tokens + 1e-6 * shares


def home(layer: int, expert: int, devices: Sequence[Device], homes: np.ndarray | None) -> Device | None:
    """The device of an expert; None where there is only the first. homes: of homes_of, None for expert e mod n."""
    return devices[expert % len(devices) if homes is None else homes[layer, expert]] if devices else None


def own_experts(device: int, devices: int, num_experts: int) -> range:
    """Of a layer, by the modulo, in the order of a device's slots."""
    return range(device, num_experts, devices)


def slots_behind(count: int, devices: int, first: int) -> np.ndarray:
    """[count] int32, slots of a pool that are dealt out to the devices in turn, each device's behind its first ones.

    first: slots of each device that are for other things; a device has most_experts(devices, count) further ones.

    >>> slots_behind(5, 2, first=10).tolist()
    [10, 23, 11, 24, 12]
    """
    numbers = np.arange(count, dtype=np.int32)
    return numbers % devices * (first + most_experts(devices, count)) + first + numbers // devices


def most_of_process(processes: int, devices: int, num_experts: int) -> int:
    """Of a layer, in the host memory of one process: `devices` are those of all, as many of each."""
    return min(devices // processes * most_experts(devices, num_experts), num_experts)


def most_experts(devices: int, num_experts: int) -> int:
    """Of a layer, or of other blocks that are dealt out, on the device that has most."""
    return -(-num_experts // devices)


def whole_slots(num_layers: int, devices: int, num_experts: int) -> np.ndarray:
    """[L, E] int32, the slots of experts where these layers are all that a pool holds: each device's own, by the modulo."""
    experts = np.arange(num_experts, dtype=np.int32)
    homes, layers = experts % devices, np.arange(num_layers, dtype=np.int32)[:, None]
    held = np.bincount(homes, minlength=devices)[homes]  # of each layer, where this expert is
    return (homes * num_layers * most_experts(devices, num_experts) + layers * held + experts // devices).astype(np.int32)
