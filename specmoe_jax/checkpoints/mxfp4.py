"""MXFP4 (Open Compute MX formats 1.0): 4-bit floats in groups of 32 that share a power of two. Decoded when loaded.

The values are exact in bfloat16. Host memory and link then carry 16 bits a weight, 4 times what is stored.
"""

import numpy as np

# E2M1: a sign bit, two of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)  # [256, 2]: low nibble first
_EXPONENT_BIAS = 127


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks [..., groups, 16] and scales [..., groups], uint8 -> float32 [..., groups * 32]. Scale 255 is NaN."""
    values = _PAIRS[blocks].reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])
    with np.errstate(over="ignore"):  # becomes Inf, which the check for finite weights reports
        values = np.ldexp(values, scales[..., None].astype(np.int32) - _EXPONENT_BIAS)
    values = np.where(scales[..., None] == 255, np.float32(np.nan), values)
    return values.reshape(*blocks.shape[:-2], -1)
