"""Models of published shapes with random bfloat16 weights, made on the accelerator (numpy would take longer than all else)."""

import itertools

import jax
import jax.numpy as jnp

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.spec import map_specs

MIXTRAL_LAYERS = 32


def mixtral_8x7b(layers: int) -> ModelConfig:
    """The published sizes, with as many layers as said."""
    return ModelConfig(
        family="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        expert_hidden=14336,
        num_experts=8,
        experts_per_token=2,
        max_positions=4096,
        rope_theta=1e6,
        norm_eps=1e-5,
        tie_embeddings=False,
        eos_token_ids=(),
    )


def layers_that_fit(host_bytes: int, rows: int, positions: int) -> int:
    """Layers whose experts, and KV cache of `rows` requests, take two thirds of the host memory, at least 1."""
    one = mixtral_8x7b(1)
    layer = one.num_experts * one.expert_params * 2 + rows * positions * 4 * one.num_kv_heads * one.head_dim
    return max(1, min(MIXTRAL_LAYERS, int(host_bytes * 2 / 3) // layer))


def random_on_device(config: ModelConfig) -> Model:
    """Normal weights of standard deviation 1 / sqrt(fan in); norms are ones. Its text means nothing."""
    keys = (jax.random.key(i) for i in itertools.count())
    model = config.hidden_size

    def tensor(spec) -> jax.Array:
        return jnp.ones(spec.shape, jnp.bfloat16) if spec.init == "ones" else _normal(next(keys), spec.shape, spec.shape[-1])

    def block() -> jax.Array:
        return to_host(jax.lax.bitcast_convert_type(_normal(next(keys), config.experts.block_shape, model), jnp.uint16))

    return Model(
        config=config,
        weights=map_specs(tensor, family_of(config).weight_specs(config)),
        experts=tuple(tuple(block() for _ in range(config.num_experts)) for _ in config.expert_layers),
        tokenizer=None,
        dtype="bfloat16",
        synthetic=("random_weights",),
    )


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(fan_in**-0.5)
