"""Models with experts of random bytes, in the forms that checkpoints are published in."""

import dataclasses

import numpy as np

from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.packing import unpacked
from specmoe_jax.models.packing.random import random_expert


def packed_model(model: Model, packing: str) -> tuple[Model, Model]:
    """The model with experts of random bytes, and the same where they are decoded."""
    config, rng = model.config.with_packing(packing), np.random.default_rng(0)
    experts = [[random_expert(config.experts, rng) for _ in layer] for layer in model.experts]
    packed = tuple(tuple(map(to_host, layer)) for layer in experts)
    exact = tuple(tuple(to_host(unpacked(config.experts, block)) for block in layer) for layer in experts)
    return dataclasses.replace(model, config=config, experts=packed), dataclasses.replace(model, experts=exact)
