"""fp8:R x C: 8-bit floats (e4m3) with one scale per block of R x C weights (DeepSeek, Qwen, MiniMax, GLM: 128 x 128).

`weight_scale_inv` multiplies, despite its name. Scales are published in float32 or bfloat16 and kept in float32.
"""

import dataclasses

import ml_dtypes
import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section
from specmoe_jax.models.packing.matrices import KERNEL_UNIT, MatrixKind, PublishedTensor, groups_of, into, rowwise_kernel

CODES = np.dtype(ml_dtypes.float8_e4m3fn)
NAN = 0x7F  # the magnitude of the only codes that are not finite


@dataclasses.dataclass(frozen=True)
class Fp8(MatrixKind):
    """block: rows and columns of weights that share a scale."""

    block: tuple[int, int]
    mark = ".weight_scale_inv"

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        return {
            "codes": Section((rows, columns), CODES),
            "scales": Section(self._blocks(rows, columns), np.dtype(np.float32)),
        }

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        return (
            PublishedTensor(".weight", (rows, columns), ("F8_E4M3",), into("codes")),
            PublishedTensor(self.mark, self._blocks(rows, columns), ("F32", "BF16", "F16"), into("scales")),
        )

    def decode_matrix(self, parts, columns: int, xp):
        codes, scales = parts["codes"], parts["scales"]
        rows = codes.shape[0]
        for axis, (size, length) in enumerate(zip(self.block, (rows, columns), strict=True)):
            scales = xp.repeat(scales, size, axis=axis)[(slice(None),) * axis + (slice(length),)]
        return codes.astype(np.float32) * scales

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        rows, columns = self.block
        return None if columns % KERNEL_UNIT else rowwise_kernel(config, "fp8", group=columns, block_rows=rows)

    def is_finite(self, parts) -> bool:
        magnitudes = parts["codes"].view(np.uint8) & 0x7F
        return bool((magnitudes != NAN).all() and np.isfinite(parts["scales"]).all())

    def _blocks(self, rows: int, columns: int) -> tuple[int, int]:
        return groups_of(rows, self.block[0]), groups_of(columns, self.block[1])


def kind(parameters: str) -> Fp8:
    rows, columns = (int(number) for number in parameters.split("x"))
    return Fp8((rows, columns))
