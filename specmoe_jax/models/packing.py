"""Experts as one row of bytes each: codes of 8 or 4 bits, their scales, and what biases they have, in float32.

They stay so on the link and in the slots, and are unpacked tile by tile inside the feed-forward network: a slot then takes a
fraction of the accelerator's memory, which holds more experts, at the price of unpacking them each time they are used.

int8  one float32 scale per output channel: per row of gate and up, per column of down transposed. Codes -127..127.
int4  one bfloat16 scale per 32 weights that lie side by side in a row of the block, two codes of -7..7 to a byte, the even one low.

Each scale maps the largest magnitude to the largest code (round to nearest even, no calibration data). Deviation from the usual
4-bit layout: the groups of down run along its output channels, since that is how its rows lie in a block.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig

GROUP = 32
LARGEST = {"int8": 127, "int4": 7}


class Section(NamedTuple):
    """A part of the bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def sections(config: ExpertConfig) -> dict[str, Section]:
    """What the bytes of a packed expert hold, in order: codes, scales, biases."""
    matrices, hidden, model = config.matrices, config.hidden, config.model
    if config.packing == "int8":
        codes = Section((matrices, hidden, model), np.dtype(np.int8))
        scales = Section(((matrices - 1) * hidden + model,), np.dtype(np.float32))
    else:
        groups = -(-model // GROUP)
        codes = Section((matrices, hidden, groups * GROUP // 2), np.dtype(np.uint8))
        scales = Section((matrices, hidden, groups), np.dtype(ml_dtypes.bfloat16))
    biases = Section((((matrices - 1) * hidden + model) if config.biased else 0,), np.dtype(np.float32))
    return {"codes": codes, "scales": scales, "biases": biases}


def packed_bytes(config: ExpertConfig) -> int:
    """Bytes of an expert in host memory, on the link and in a slot."""
    return sum(section.bytes for section in sections(config).values())


def pack(config: ExpertConfig, block: np.ndarray) -> np.ndarray:
    """[bytes] uint8 of a block in float32, or bfloat16 as uint16 bits."""
    block = (block.view(ml_dtypes.bfloat16) if block.dtype == np.uint16 else block).astype(np.float32)
    core = block[:, : config.hidden, : config.model]
    codes, scales = (_pack8 if config.packing == "int8" else _pack4)(core)
    border = [block[:-1, :-1, -1].reshape(-1), block[-1, -1, :-1]] if config.biased else []
    biases = np.concatenate([np.zeros(0, np.float32), *border])
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in (codes, scales, biases)])


def unpack(config: ExpertConfig, packed: jax.Array) -> jax.Array:
    """The float32 block that the bytes stand for."""
    parts, start = {}, 0
    for name, section in sections(config).items():
        raw = packed[start : start + section.bytes].reshape(*section.shape, section.dtype.itemsize)
        raw = raw[..., 0] if section.dtype.itemsize == 1 else raw
        parts[name] = jax.lax.bitcast_convert_type(raw, section.dtype)
        start += section.bytes
    block = (_unpack8 if config.packing == "int8" else _unpack4)(parts["codes"], parts["scales"])[:, :, : config.model]
    if not config.biased:
        return block
    inner = jnp.pad(parts["biases"][: -config.model].reshape(-1, config.hidden), ((0, 1), (0, 1)))  # one row more: down has none
    block = jnp.concatenate([block, inner[:, :-1, None]], axis=2)
    last = jnp.zeros((config.matrices, 1, config.model + 1)).at[-1, 0, :-1].set(parts["biases"][-config.model :])
    return jnp.concatenate([block, last], axis=1)


def unpacked(config: ExpertConfig, block: np.ndarray) -> np.ndarray:
    """A stored block, packed or not, in a form that holds weights: float32, or bfloat16 as uint16 bits."""
    return block if config.packing is None else np.asarray(unpack(config, jnp.asarray(block)))


def without_packing(config: ExpertConfig) -> ExpertConfig:
    """What the expert computes once it is unpacked."""
    return dataclasses.replace(config, packing=None)


def _codes(weights: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    return np.clip(np.rint(weights / np.where(scales > 0, scales, 1)), -largest, largest).astype(np.int8)


def _pack8(core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.abs(core[:-1]).max(axis=2) / np.float32(LARGEST["int8"])  # [matrices - 1, F]
    columns = np.abs(core[-1]).max(axis=0) / np.float32(LARGEST["int8"])  # [M]
    scales = np.concatenate([np.broadcast_to(rows[..., None], core[:-1].shape), np.broadcast_to(columns, core[-1:].shape)])
    return _codes(core, scales, LARGEST["int8"]), np.concatenate([rows.reshape(-1), columns])


def _unpack8(codes: jax.Array, scales: jax.Array) -> jax.Array:
    matrices, hidden, model = codes.shape
    rows, columns = scales[:-model].reshape(matrices - 1, hidden, 1), scales[-model:]
    weights = codes.astype(jnp.float32)
    return jnp.concatenate([weights[:-1] * rows, weights[-1:] * columns])


def _pack4(core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = np.pad(core, ((0, 0), (0, 0), (0, -core.shape[2] % GROUP))).reshape(*core.shape[:2], -1, GROUP)
    scales = (np.abs(groups).max(axis=3) / np.float32(LARGEST["int4"])).astype(ml_dtypes.bfloat16)
    codes = (
        (_codes(groups, scales[..., None].astype(np.float32), LARGEST["int4"]) + 8).astype(np.uint8).reshape(*core.shape[:2], -1)
    )
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def _unpack4(codes: jax.Array, scales: jax.Array) -> jax.Array:
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, GROUP)
    weights = (nibbles.astype(jnp.float32) - 8) * scales[..., None].astype(jnp.float32)
    return weights.reshape(*scales.shape[:2], -1)
