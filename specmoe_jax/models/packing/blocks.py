"""A packed expert as a whole: its bytes, and the block that they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import PackingKind, QuantisingKind, Section
from specmoe_jax.models.packing.registry import kind_of


def sections(config: ExpertConfig) -> dict[str, Section]:
    """What the bytes of a packed expert hold, in order."""
    return _kind(config).sections(config)


def packed_bytes(config: ExpertConfig) -> int:
    """Bytes of an expert in host memory, on the link and in a slot."""
    return sum(section.bytes for section in sections(config).values())


def pack(config: ExpertConfig, block: np.ndarray) -> np.ndarray:
    """[bytes] uint8 of a block in float32, or bfloat16 as uint16 bits, by a kind that a plan can ask for."""
    block = (block.view(ml_dtypes.bfloat16) if block.dtype == np.uint16 else block).astype(np.float32)
    kind = cast(QuantisingKind, _kind(config))
    parts = kind.encode(config, block[:, : config.hidden, : config.model])
    border = [block[:-1, :-1, -1].reshape(-1), block[-1, -1, :-1]] if config.biased else []
    parts = parts | {"biases": np.concatenate([np.zeros(0, np.float32), *border])}
    return np.concatenate([np.ascontiguousarray(parts[name]).reshape(-1).view(np.uint8) for name in kind.sections(config)])


def unpack(config: ExpertConfig, packed: jax.Array) -> jax.Array:
    """The float32 block that the bytes stand for."""

    def array(raw: jax.Array, section: Section) -> jax.Array:
        raw = raw.reshape(*section.shape, section.dtype.itemsize)
        return jax.lax.bitcast_convert_type(raw[..., 0] if section.dtype.itemsize == 1 else raw, section.dtype)

    parts = _parts(sections(config), packed, array)
    return _bordered(config, _kind(config).decode(config, parts, jnp), parts.get("biases"), jnp)


def unpacked(config: ExpertConfig, block: np.ndarray) -> np.ndarray:
    """A stored block, packed or not, in a form that holds weights: float32, or bfloat16 as uint16 bits."""
    if config.packing is None:
        return block
    parts = views(config, block)
    return _bordered(config, _kind(config).decode(config, parts, np), parts.get("biases"), np)


def views(config: ExpertConfig, packed: np.ndarray) -> dict[str, np.ndarray]:
    """The sections of a packed expert in host memory, as arrays over its bytes."""
    return arrays(sections(config), packed)


def arrays(layout: Mapping[str, Section], packed: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays over bytes that hold such sections one behind the other."""
    return _parts(layout, packed, lambda raw, section: raw.view(section.dtype).reshape(section.shape))


def without_packing(config: ExpertConfig) -> ExpertConfig:
    """What the expert computes once it is unpacked."""
    return dataclasses.replace(config, packing=None)


def _kind(config: ExpertConfig) -> PackingKind:
    assert config.packing is not None
    return kind_of(config.packing)


def _parts(layout: Mapping[str, Section], packed, array) -> dict:
    parts, start = {}, 0
    for name, section in layout.items():
        parts[name] = array(packed[start : start + section.bytes], section)
        start += section.bytes
    return parts


def _bordered(config: ExpertConfig, core, biases, xp):
    """The block of weights [matrices, F, M] and of the biases that border them (models/experts.py)."""
    if not config.biased:
        return core
    inner = biases[: -config.model].reshape(-1, config.hidden)  # down has none
    inner = xp.pad(inner, ((0, 1), (0, 0)))
    block = xp.concatenate([core, inner[:, :, None]], axis=2)
    last = xp.pad(biases[-config.model :][None, None], ((config.matrices - 1, 0), (0, 0), (0, 1)))
    return xp.concatenate([block, last], axis=1)
