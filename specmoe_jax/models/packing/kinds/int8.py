"""int8: one float32 scale per output channel: per row of gate and up, per column of down transposed. Codes -127..127.

Each scale maps the largest magnitude to the largest code (round to nearest even, no calibration data).
"""

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section, border_biases, is_plain

LARGEST = 127


class Int8:
    published = False

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        matrices, hidden, model = config.matrices, config.hidden, config.model
        return {
            "codes": Section((matrices, hidden, model), np.dtype(np.int8)),
            "scales": Section(((matrices - 1) * hidden + model,), np.dtype(np.float32)),
            "biases": border_biases(config),
        }

    def encode(self, config: ExpertConfig, core: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.abs(core[:-1]).max(axis=2) / np.float32(LARGEST)  # [matrices - 1, F]
        columns = np.abs(core[-1]).max(axis=0) / np.float32(LARGEST)  # [M]
        scales = np.concatenate([np.broadcast_to(rows[..., None], core[:-1].shape), np.broadcast_to(columns, core[-1:].shape)])
        return {"codes": codes(core, scales, LARGEST), "scales": np.concatenate([rows.reshape(-1), columns])}

    def decode(self, config: ExpertConfig, parts, xp):
        scales, weights = parts["scales"], parts["codes"].astype(np.float32)
        rows, columns = scales[: -config.model].reshape(config.matrices - 1, config.hidden, 1), scales[-config.model :]
        return xp.concatenate([weights[:-1] * rows, weights[-1:] * columns])

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return Kernel("int8") if is_plain(config) else None


def codes(weights: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    """The weights in units of their scales, as integers of at most that magnitude."""
    return np.clip(np.rint(weights / np.where(scales > 0, scales, 1)), -largest, largest).astype(np.int8)


def kind(parameters: str) -> Int8:
    return Int8()
