"""Models of published shapes with random bfloat16 weights, made on the accelerator (numpy would take longer than all else)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from specmoe_jax.benchmarks.specmoeoff import head_config_of
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.families.registry import FAMILIES, family_of
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.spec import map_specs
from specmoe_jax.models.synthetic import NLLB_SHAPED, TOPIC, with_synthetic_routing


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


def qwen3_30b(layers: int) -> ModelConfig:
    """Qwen3-30B-A3B's sizes, with as many layers as said."""
    raw = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    }
    return FAMILIES["qwen3_moe"].parse_config(raw)


NLLB_LINK_BOUND = dataclasses.replace(
    NLLB_SHAPED,
    hidden_size=2048,
    num_layers=2,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    expert_hidden=8192,
)
"""NLLB-MoE-54B's experts (2,048 x 8,192, 128 of them, top-2), with a gate as every SwiGLU expert: 1.5 times as large."""


def random_on_device(config: ModelConfig) -> Model:
    """Normal weights of standard deviation 1 / sqrt(fan in); norms are ones. Its text means nothing."""
    keys, model = _keys(0), config.hidden_size

    def block() -> jax.Array:
        return to_host(jax.lax.bitcast_convert_type(_normal(next(keys), config.experts.block_shape, model), jnp.uint16))

    return Model(
        config=config,
        weights=map_specs(lambda spec: _tensor(keys, spec), family_of(config).weight_specs(config)),
        experts=tuple(tuple(block() for _ in range(config.num_experts)) for _ in config.expert_layers),
        tokenizer=None,
        dtype="bfloat16",
        synthetic=("random_weights",),
    )


def skewed_on_device(config: ModelConfig) -> Model:
    """With the published skew of NLLB-MoE's routing, and a text that counts (models/synthetic.py)."""
    return with_synthetic_routing(random_on_device(config))


def random_head(model: Model) -> EagleHead:
    """A random EAGLE head as wide as its model."""
    config, keys = head_config_of(model), _keys(1 << 20)
    return eagle.attach(config, map_specs(lambda spec: _tensor(keys, spec), eagle.weight_specs(config)), model)


def _keys(first: int):
    return (jax.random.key(i) for i in itertools.count(first))


def _tensor(keys, spec) -> jax.Array:
    return jnp.ones(spec.shape, jnp.bfloat16) if spec.init == "ones" else _normal(next(keys), spec.shape, spec.shape[-1])


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(fan_in**-0.5)


def small(config: ModelConfig) -> ModelConfig:
    """The rules of a shape at sizes for a CPU."""
    layer = config.layers[0]
    attention = dataclasses.replace(layer.attention, num_heads=2, num_kv_heads=1)
    router = dataclasses.replace(layer.own_router, num_experts=8, experts_per_token=2)
    experts = dataclasses.replace(layer.own_experts, hidden=32, model=64)
    layer = dataclasses.replace(layer, attention=attention, router=router, experts=experts)
    sizes = {"vocab_size": 2 * TOPIC, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 32}
    sizes |= {"num_experts": 8, "experts_per_token": 2}
    return dataclasses.replace(config, **sizes, layer_configs=(layer,) * config.num_layers)
