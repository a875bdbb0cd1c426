"""What the planner's tests share."""

import dataclasses

from specmoe_jax.testing import TINY

# Mixtral-8x7B
MIXTRAL = dataclasses.replace(
    TINY,
    vocab_size=32_000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    expert_hidden=14_336,
    num_experts=8,
    experts_per_token=2,
    max_positions=32_768,
)
