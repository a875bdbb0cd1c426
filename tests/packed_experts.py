"""Experts of random bytes, in the forms that checkpoints are published in."""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.packing import packed_bytes, unpacked
from specmoe_jax.models.packing.blocks import views


def random_bytes(config: ExpertConfig, rng: np.random.Generator) -> np.ndarray:
    """An expert whose weights are of some size around 1 / sqrt(inputs)."""
    packed = np.zeros(packed_bytes(config), np.uint8)
    for name, part in views(config, packed).items():
        if part.dtype == np.uint8:
            part[...] = rng.integers(118, 123, part.shape) if name.endswith("scales") else rng.integers(0, 256, part.shape)
        elif name.endswith("codes"):
            part[...] = (rng.standard_normal(part.shape) * 10).astype(part.dtype)
        elif part.dtype.itemsize == 1:  # scales in e4m3
            part[...] = rng.uniform(0.5, 2, part.shape).astype(part.dtype)
        else:
            part[...] = rng.uniform(0.005, 0.02, part.shape).astype(part.dtype)
    return packed


def packed_model(model: Model, packing: str) -> tuple[Model, Model]:
    """The model with experts of random bytes, and the same where they are decoded."""
    config, rng = model.config.with_packing(packing), np.random.default_rng(0)
    experts = [[random_bytes(config.experts, rng) for _ in layer] for layer in model.experts]
    packed = tuple(tuple(map(to_host, layer)) for layer in experts)
    exact = tuple(tuple(to_host(unpacked(config.experts, block)) for block in layer) for layer in experts)
    return dataclasses.replace(model, config=config, experts=packed), dataclasses.replace(model, experts=exact)
