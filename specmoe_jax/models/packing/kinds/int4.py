"""int4: one bfloat16 scale per 32 weights that lie side by side in a row of the block, two codes of -7..7 to a byte, the even one
low.

Each scale maps the largest magnitude to the largest code (round to nearest even, no calibration data). Deviation from the usual
4-bit layout: the groups of down run along its output channels, since that is how its rows lie in a block.
"""

import ml_dtypes
import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section, border_biases, is_plain
from specmoe_jax.models.packing.kinds.int8 import codes
from specmoe_jax.ops.codes import INT4_OFFSET, decoded_int4

GROUP = 32
LARGEST = 7


class Int4:
    published = False

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        matrices, hidden, groups = config.matrices, config.hidden, -(-config.model // GROUP)
        return {
            "codes": Section((matrices, hidden, groups * GROUP // 2), np.dtype(np.uint8)),
            "scales": Section((matrices, hidden, groups), np.dtype(ml_dtypes.bfloat16)),
            "biases": border_biases(config),
        }

    def encode(self, config: ExpertConfig, core: np.ndarray) -> dict[str, np.ndarray]:
        packed, scales = encode_rows(core)
        return {"codes": packed, "scales": scales}

    def decode(self, config: ExpertConfig, parts, xp):
        return decoded_int4(parts["codes"], parts["scales"], xp)[:, :, : config.model]

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return Kernel("int4") if is_plain(config) else None


def encode_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., M] float32 -> codes [..., bytes of whole groups] uint8 and scales [..., groups] bfloat16."""
    groups = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % GROUP)]).reshape(*rows.shape[:-1], -1, GROUP)
    scales = (np.abs(groups).max(axis=-1) / np.float32(LARGEST)).astype(ml_dtypes.bfloat16)
    nibbles = codes(groups, scales[..., None].astype(np.float32), LARGEST) + INT4_OFFSET
    nibbles = nibbles.astype(np.uint8).reshape(*rows.shape[:-1], -1)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales


def kind(parameters: str) -> Int4:
    return Int4()
