"""Random experts in the published forms, for tests and for speed where text does not matter."""

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.blocks import packed_bytes, views


def random_expert(config: ExpertConfig, rng: np.random.Generator) -> np.ndarray:
    """[bytes] of an expert whose weights are finite, of some size around 1 / sqrt(inputs)."""
    packed = np.zeros(packed_bytes(config), np.uint8)
    for name, part in views(config, packed).items():
        if part.dtype == np.uint8:  # exponents, or two codes of 4 bits
            is_exponent = name.endswith("scales") or name == "largest"
            part[...] = rng.integers(118, 123, part.shape) if is_exponent else rng.integers(0, 256, part.shape)
        elif part.dtype == np.int32:  # places: none
            part[...] = config.matrices * config.hidden * config.model
        elif name.endswith("codes"):
            part[...] = (rng.standard_normal(part.shape) * 10).astype(part.dtype)
        elif part.dtype.itemsize == 1:  # scales in e4m3
            part[...] = rng.uniform(0.5, 2, part.shape).astype(part.dtype)
        else:
            part[...] = rng.uniform(0.005, 0.02, part.shape).astype(part.dtype)
    return packed
