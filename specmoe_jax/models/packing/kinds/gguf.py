"""gguf:GATE,UP,DOWN: blocks of llama.cpp's formats, of one type for each matrix (Q4_K, ...), byte for byte as a GGUF file has them.

A block holds 32 or 256 weights of a row, its codes and scales. Decoded as the `gguf` package does, bit for bit: each product of a
scale, the scale of a scale and a code is exact in float32, so only the sum with an offset is rounded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Section, border_biases
from specmoe_jax.models.packing.matrices import MatrixKind, Sections, matrices, sections_of
from specmoe_jax.support.errors import CheckpointError


class BlockType(NamedTuple):
    """values: weights of a block. bytes: it takes. decode: (blocks [..., bytes], numpy or jax.numpy) -> float32 [..., values].

    scales: where the float16 numbers of a block begin. exponent: where one is a power of two instead.
    """

    values: int
    bytes: int
    decode: Callable[[Any, Any], Any]
    scales: tuple[int, ...] = (0,)
    exponent: int | None = None


LARGEST_EXPONENT = 252  # of MXFP4: beyond it codes may leave float32


def _half(blocks, at: int):
    """float32 [..., 1] of the float16 at a byte."""
    low, high = (blocks[..., at + i].astype(np.uint16) for i in (0, 1))
    return (low | (high << 8)).view(np.float16).astype(np.float32)[..., None]


def _halves(codes, xp):
    """4-bit codes: the low ones of all bytes, then the high ones."""
    return xp.concatenate([codes & 15, codes >> 4], axis=-1)


def _bits(raw, shifts: tuple[int, ...], mask: int, xp):
    """[..., len(shifts), n] of bytes [..., n]: those bits of each."""
    return (raw[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _signed(codes):
    """Bytes as the int8 with the same bits, in float32."""
    return codes.view(np.int8).astype(np.float32)


def _q8_0(blocks, xp):
    return _signed(blocks[..., 2:]) * _half(blocks, 0)


def _q4_0(blocks, xp):
    return (_halves(blocks[..., 2:], xp).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks, xp):
    return _halves(blocks[..., 4:], xp).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _fifth_bits(blocks, at: int, xp):
    """The fifth bit of 32 codes, a bit each of 4 bytes."""
    bits = (blocks[..., at : at + 4, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return (bits << 4).reshape(*blocks.shape[:-1], 32)


def _q5_0(blocks, xp):
    codes = _halves(blocks[..., 6:], xp) | _fifth_bits(blocks, 2, xp)
    return (codes.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks, xp):
    codes = _halves(blocks[..., 8:], xp) | _fifth_bits(blocks, 4, xp)
    return codes.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _mxfp4(blocks, xp):
    """Doubled e2m1 values times half a power of two, in two factors that float32 holds as normal numbers."""
    values = xp.asarray(np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32))
    exponents = blocks[..., :1].astype(np.int32)
    half = exponents // 2
    first, second = ((((part + 127) << 23).astype(np.int32)).view(np.float32) for part in (half - 64, exponents - half - 64))
    return values[_halves(blocks[..., 1:], xp).astype(np.int32)] * first * second


def _q2_k(blocks, xp):
    scales, codes = blocks[..., :16], blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 32)
    factors = _half(blocks, 80) * (scales & 15).astype(np.float32)
    offsets = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    codes = _bits(codes, (0, 2, 4, 6), 3, xp).reshape(*blocks.shape[:-1], 16, 16).astype(np.float32)
    return (factors[..., None] * codes - offsets[..., None]).reshape(*blocks.shape[:-1], 256)


def _k_scales(raw, xp):
    """Eight 6-bit scales and eight 6-bit offsets of 12 bytes."""
    scales, offsets, both = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    high = [(part >> 2) & 0x30 for part in (scales, offsets)]
    scales = xp.concatenate([scales & 63, (both & 15) | high[0]], axis=-1)
    return scales, xp.concatenate([offsets & 63, (both >> 4) | high[1]], axis=-1)


def _scaled(blocks, codes, xp):
    """codes [..., 8, 32] of Q4_K and Q5_K, whose blocks begin alike."""
    scales, offsets = _k_scales(blocks[..., 4:16], xp)
    factors = _half(blocks, 0) * scales.astype(np.float32)
    subtracted = _half(blocks, 2) * offsets.astype(np.float32)
    return (factors[..., None] * codes.astype(np.float32) - subtracted[..., None]).reshape(*blocks.shape[:-1], 256)


def _nibble_groups(raw, groups: int, size: int, xp):
    """[..., 2 * groups, size]: of each group of bytes the low halves, then the high ones."""
    return _bits(raw.reshape(*raw.shape[:-1], groups, size), (0, 4), 15, xp).reshape(*raw.shape[:-1], 2 * groups, size)


def _q4_k(blocks, xp):
    return _scaled(blocks, _nibble_groups(blocks[..., 16:], 4, 32, xp), xp)


def _q5_k(blocks, xp):
    fifth = _bits(blocks[..., 16:48], tuple(range(8)), 1, xp) << 4
    return _scaled(blocks, _nibble_groups(blocks[..., 48:], 4, 32, xp) | fifth, xp)


def _q6_k(blocks, xp):
    outer = blocks.shape[:-1]
    low = _nibble_groups(blocks[..., :128], 2, 64, xp).reshape(*outer, 8, 32)
    high = _bits(blocks[..., 128:192].reshape(*outer, 2, 32), (0, 2, 4, 6), 3, xp).reshape(*outer, 8, 32)
    codes = (low | (high << 4)).astype(np.float32).reshape(*outer, 16, 16) - 32
    factors = _half(blocks, 208) * _signed(blocks[..., 192:208])
    return (factors[..., None] * codes).reshape(*outer, 256)


TYPES = {
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1, (0, 2)),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1, (0, 2)),
    "MXFP4": BlockType(32, 17, _mxfp4, (), 0),
    "Q2_K": BlockType(256, 84, _q2_k, (80, 82)),
    "Q4_K": BlockType(256, 144, _q4_k, (0, 2)),
    "Q5_K": BlockType(256, 176, _q5_k, (0, 2)),
    "Q6_K": BlockType(256, 210, _q6_k, (208,)),
}


@dataclasses.dataclass(frozen=True)
class Gguf(MatrixKind):
    """types: of gate, up and down."""

    types: tuple[str, ...]
    mark = "_stack"
    stacked = True

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        found = {}
        for (name, (rows, columns)), kind in zip(matrices(config).items(), self._types, strict=True):
            found[f"{name}.blocks"] = Section((rows, columns // kind.values, kind.bytes), np.dtype(np.uint8))
        return found | {"biases": border_biases(config)}

    def decode(self, config: ExpertConfig, parts: Mapping[str, Any], xp):
        *inner, down = (
            kind.decode(parts[f"{name}.blocks"], xp).reshape(shape)
            for (name, shape), kind in zip(matrices(config).items(), self._types, strict=True)
        )
        return xp.stack([*inner, down.T])

    def expert_is_finite(self, config: ExpertConfig, parts: Sections) -> bool:
        for name, kind in zip(matrices(config), self._types, strict=True):
            blocks = sections_of(parts, name)["blocks"]
            if any(not np.isfinite(_half(blocks, at)).all() for at in kind.scales):
                return False
            if kind.exponent is not None and (blocks[..., kind.exponent] > LARGEST_EXPONENT).any():
                return False
        return True

    def expert_problem(self, config: ExpertConfig) -> str | None:
        shapes = matrices(config)
        if len(shapes) != len(self.types):
            return f"{len(self.types)} types for {len(shapes)} matrices"
        for (_, columns), name, kind in zip(shapes.values(), self.types, self._types, strict=True):
            if columns % kind.values:
                return f"{columns} inputs are no whole number of blocks of {name}"
        return None

    @property
    def _types(self) -> list[BlockType]:
        return [TYPES[name] for name in self.types]


def kind(parameters: str) -> Gguf:
    types = tuple(parameters.split(","))
    if unknown := [name for name in types if name not in TYPES]:
        raise CheckpointError(f"experts in GGUF blocks of {unknown[0]!r}; this version keeps {', '.join(TYPES)} packed")
    return Gguf(types)
