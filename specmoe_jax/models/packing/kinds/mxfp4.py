"""MXFP4 (Open Compute MX formats 1.0; gpt-oss): 4-bit floats (e2m1) in groups of 32 inputs that share a power of two.

Two codes to a byte, the even one low.
"""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section
from specmoe_jax.models.packing.matrices import MatrixKind, PublishedTensor, into, rowwise_kernel

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1: a sign bit, two of exponent, one of mantissa
VALUES = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32)
LARGEST = 252  # of the exponents: beyond it codes may leave float32, and 255 is NaN


@dataclasses.dataclass(frozen=True)
class Mxfp4(MatrixKind):
    fused = True
    mark = "_scales"

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        return {
            "codes": Section((rows, columns // GROUP, GROUP // 2), np.dtype(np.uint8)),
            "scales": Section((rows, columns // GROUP), np.dtype(np.uint8)),
        }

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        return tuple(
            PublishedTensor(suffix, self.matrix(rows, columns)[section].shape, ("U8",), into(section))
            for suffix, section in (("_blocks", "codes"), (self.mark, "scales"))
        )

    def decode_matrix(self, parts, columns: int, xp):
        values = nibbles(parts["codes"], VALUES, xp)
        exponents = parts["scales"].astype(np.int32)
        # In two factors, each of which float32 holds as a normal number for every exponent from 1 to 254.
        half = exponents // 2
        scales = [power_of_two(part, xp)[..., None] for part in (half - 64, exponents - half - 63)]
        return (values * scales[0] * scales[1]).reshape(-1, columns)

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return rowwise_kernel(config, "mxfp4", group=GROUP)

    def is_finite(self, parts) -> bool:
        return bool((parts["scales"] <= LARGEST).all())

    def problem(self, rows: int, columns: int) -> str | None:
        return None if columns % GROUP == 0 else f"{columns} inputs are no whole number of groups of {GROUP}"


def nibbles(codes, values: np.ndarray, xp):
    """The values that 4-bit codes [..., n] stand for, [..., 2n], the low one of a byte first."""
    both = xp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return xp.asarray(values)[both.astype(np.int32)]


def power_of_two(exponents, xp):
    """2 to integers from -126 to 127, in float32."""
    bits = ((exponents + 127) << 23).astype(np.int32)
    return bits.view(np.float32)


def kind(parameters: str) -> Mxfp4:
    return Mxfp4()
