"""fp8_rows:channel, fp8_rows:tensor: 8-bit floats (e4m3) with one scale per output, or one for a matrix.

compressed-tensors' float-quantized form, ModelOpt's FP8 and older FP8 checkpoints. Scales of activations are not used.
"""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section
from specmoe_jax.models.packing.kinds.fp8 import CODES, NAN
from specmoe_jax.models.packing.matrices import MatrixKind, PublishedTensor, Sections, ignored, into, rowwise_kernel

WHOLE = 1 << 30  # rows or columns of a block that is the whole matrix


@dataclasses.dataclass(frozen=True)
class Fp8Rows(MatrixKind):
    per_row: bool
    mark = ".weight_scale"

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        return {
            "codes": Section((rows, columns), CODES),
            "scales": Section((rows if self.per_row else 1, 1), np.dtype(np.float32)),
        }

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        return (
            PublishedTensor(".weight", (rows, columns), ("F8_E4M3",), into("codes")),
            PublishedTensor(self.mark, (rows, 1) if self.per_row else (), ("F32", "BF16", "F16"), into("scales")),
            PublishedTensor(".input_scale", (), ("F32", "BF16"), ignored, optional=True),
        )

    def decode_matrix(self, parts, columns: int, xp):
        return parts["codes"].astype(np.float32) * parts["scales"]

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return rowwise_kernel(config, "fp8", group=WHOLE, block_rows=1 if self.per_row else WHOLE)

    def is_finite(self, parts: Sections) -> bool:
        magnitudes = parts["codes"].view(np.uint8) & 0x7F
        return bool((magnitudes != NAN).all() and np.isfinite(parts["scales"]).all())


def kind(parameters: str) -> Fp8Rows:
    return Fp8Rows(per_row=parameters == "channel")
