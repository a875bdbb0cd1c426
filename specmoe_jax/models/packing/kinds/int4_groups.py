"""What the published 4-bit integer formats share once they are in memory: codes of 0 to 15 in groups of inputs that have one scale.

A weight is (code - zero) * scale; two codes to a byte, the even one low; the zeros of a row likewise. Without zeros it is 8.
"""

import dataclasses

import ml_dtypes
import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section
from specmoe_jax.models.packing.matrices import KERNEL_UNIT, MatrixKind, Sections, groups_of, rowwise_kernel

BFLOAT16 = ":bfloat16"  # in the name of a kind
MIDDLE = 8  # the zero of codes without zeros
NIBBLES = 8  # codes to an int32
SCALE_TYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Int4Groups(MatrixKind):
    """group: inputs that share a scale. half_scales: in float16, else in bfloat16."""

    group: int
    half_scales: bool
    zeros: bool = True

    @property
    def scale_type(self) -> str:
        """As safetensors call it."""
        return "F16" if self.half_scales else "BF16"

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        groups = columns // self.group
        found = {
            "codes": Section((rows, columns // 2), np.dtype(np.uint8)),
            "scales": Section((rows, groups), SCALE_TYPES[self.scale_type]),
        }
        return found | ({"zeros": Section((rows, groups_of(groups, 2)), np.dtype(np.uint8))} if self.zeros else {})

    def decode_matrix(self, parts, columns: int, xp):
        scales = parts["scales"].astype(np.float32)
        rows, groups = scales.shape
        codes = _unpacked(parts["codes"], xp).reshape(rows, groups, self.group)
        zeros = _unpacked(parts["zeros"], xp)[:, :groups, None] if self.zeros else np.float32(MIDDLE)
        return ((codes - zeros) * scales[..., None]).reshape(rows, columns)

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        if self.group % KERNEL_UNIT:
            return None
        return rowwise_kernel(config, "int4_groups", group=self.group, half_scales=self.half_scales, zeros=self.zeros)

    def is_finite(self, parts: Sections) -> bool:
        return bool(np.isfinite(parts["scales"].astype(np.float32)).all())

    def problem(self, rows: int, columns: int) -> str | None:
        if columns % self.group or columns % NIBBLES or rows % NIBBLES:
            return f"a matrix of {rows} x {columns} is no whole number of groups of {self.group}"
        return None


def with_scale_type(packing: str, kind: MatrixKind, scale_type: str) -> str:
    """The name of the kind with scales of that type, where it has some of either."""
    if not isinstance(kind, Int4Groups) or scale_type not in SCALE_TYPES:
        return packing
    return packing.replace(BFLOAT16, "") + (BFLOAT16 if scale_type == "BF16" else "")


def parsed(parameters: str) -> tuple[int, bool, bool]:
    """Group, whether scales are float16 and whether there are zeros, of GROUP[:bfloat16][:zeros]."""
    group, *others = parameters.split(":")
    return int(group), "bfloat16" not in others, "zeros" in others


def spread(words: np.ndarray, order: tuple[int, ...] = tuple(range(NIBBLES))) -> np.ndarray:
    """Codes [..., 8n] of int32 words [..., n]. order: of the codes that the nibbles of a word hold, from the lowest on."""
    words = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((*words.shape, NIBBLES), np.uint8)
    for nibble, place in enumerate(order):
        codes[..., place] = words >> np.uint32(4 * nibble) & np.uint32(15)
    return codes.reshape(*words.shape[:-1], -1)


def in_pairs(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, n] -> bytes [rows, ceil(n / 2)], the even one low."""
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return codes[:, ::2] | codes[:, 1::2] << 4


def in_order(values: np.ndarray, group: int) -> None:
    """A `fill` of the group of each input: raises ValueError unless they follow one another."""
    if not np.array_equal(values, np.arange(values.size) // group):
        raise ValueError("inputs are out of order (act-order, desc_act), which is not built; take a checkpoint without it")


def _unpacked(packed, xp):
    both = xp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(packed.shape[0], -1).astype(np.float32)
