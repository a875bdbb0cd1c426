"""nvfp4: 4-bit floats (e2m1) in groups of 16 inputs with a scale in e4m3, and one float32 scale for the whole matrix (ModelOpt).

A weight is code * (scale of its group * scale of the matrix), the product of the scales in float32.
"""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section
from specmoe_jax.models.packing.kinds.fp8 import CODES as SCALES
from specmoe_jax.models.packing.kinds.fp8 import NAN
from specmoe_jax.models.packing.kinds.mxfp4 import VALUES, nibbles
from specmoe_jax.models.packing.matrices import MatrixKind, PublishedTensor, Sections, ignored, into, rowwise_kernel

GROUP = 16


@dataclasses.dataclass(frozen=True)
class Nvfp4(MatrixKind):
    mark = ".weight_scale_2"

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        return {
            "codes": Section((rows, columns // 2), np.dtype(np.uint8)),
            "scales": Section((rows, columns // GROUP), SCALES),
            "scale": Section((1,), np.dtype(np.float32)),
        }

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        return (
            PublishedTensor(".weight", (rows, columns // 2), ("U8",), into("codes")),
            PublishedTensor(".weight_scale", (rows, columns // GROUP), ("F8_E4M3",), into("scales")),
            PublishedTensor(self.mark, (), ("F32",), into("scale")),
            PublishedTensor(".input_scale", (), ("F32",), ignored, optional=True),  # of activations, which are not quantised here
        )

    def decode_matrix(self, parts, columns: int, xp):
        values = nibbles(parts["codes"], VALUES, xp).reshape(-1, columns // GROUP, GROUP)
        scales = parts["scales"].astype(np.float32) * parts["scale"]
        return (values * scales[..., None]).reshape(-1, columns)

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return rowwise_kernel(config, "nvfp4", group=GROUP)

    def is_finite(self, parts: Sections) -> bool:
        magnitudes = parts["scales"].view(np.uint8) & 0x7F
        return bool((magnitudes != NAN).all() and np.isfinite(parts["scale"]).all())

    def problem(self, rows: int, columns: int) -> str | None:
        return None if columns % GROUP == 0 else f"{columns} inputs are no whole number of groups of {GROUP}"


def kind(parameters: str) -> Nvfp4:
    return Nvfp4()
