"""A model's config as a key: programs are compiled for it, and the planner remembers by it."""

import dataclasses

from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.testing.families import RAW_CONFIGS


def test_equal_configs_have_one_hash_and_equality_tells_layers_apart():
    one, same = (parse_config(RAW_CONFIGS["qwen3_moe"]) for _ in range(2))
    other = dataclasses.replace(one, layer_configs=one.layers[::-1])
    assert one is not same and hash(one) == hash(same)
    assert hash(other) == hash(one) and other != one  # layers are not hashed
    assert len({one, same, other}) == 2
