"""The layer that a model ships to predict further tokens (DeepSeek-V3, 2.2: multi-token prediction), as a draft head.

Row i holds the target's last hidden state of position i, after the final norm, beside the token after it. Both are normed
and projected to one vector, which an ordinary layer of the target, attention and experts, makes into the state of position
i + 1, after a norm of the layer's own; the target's output matrix turns that into logits of the token at i + 2. Further
tokens come from the layer's own states. Measured on several models by others, and so here: both kinds of state are taken
after their norm, which accepts more than before it (Qwen3.5: 2.7 tokens a pass against 1.8).
"""

import dataclasses
from typing import Generic

import jax
import jax.numpy as jnp
from flax import struct

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.attention import attend_rows
from specmoe_jax.models.basics import linear, rms_norm
from specmoe_jax.models.experts import block_bytes, expert_ffn
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing import without_packing
from specmoe_jax.models.published.naming import mtp_prefixes, norm_spec
from specmoe_jax.models.spec import LayerWeights, Layout, Leaf, TensorSpec, map_specs, random_block, random_tensor, spec_leaves
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import KVCache


@struct.dataclass
class MtpWeights(Generic[Leaf]):
    """All of the layer but its experts. Leaves are TensorSpecs or arrays."""

    token_norm: Leaf  # [M]
    state_norm: Leaf  # [M]
    fc: Leaf  # [M, 2M], the token's half first
    layer: LayerWeights[Leaf]
    norm: Leaf  # [M]


@struct.dataclass
class MtpHead:
    """The loaded layer. experts: all of them, [E, *block_shape], on the accelerator. embed, output: the target's, [V, M]."""

    config: LayerConfig = struct.field(pytree_node=False)
    weights: MtpWeights[jax.Array]
    experts: jax.Array
    embed: jax.Array
    output: jax.Array


def extended(config: ModelConfig) -> ModelConfig:
    """The model with the layer after its last one, as checkpoints count: its tensors then have specs like any other's.

    Its experts are never packed.
    """
    layer = config.layers[config.moe_layers[-1]]
    layer = dataclasses.replace(layer, experts=without_packing(layer.own_experts))
    return dataclasses.replace(config, num_layers=config.num_layers + 1, layer_configs=(*config.layers, layer), mtp_layers=0)


def layer_config(config: ModelConfig) -> LayerConfig:
    """What the layer computes: it is like the last one that has experts, wherever the dense ones are."""
    return extended(config).layers[-1]


def weight_specs(config: ModelConfig) -> MtpWeights[TensorSpec]:
    """Names and shapes beside the experts'."""
    prefix, hidden = mtp_prefixes(config)[0].removesuffix("."), config.hidden_size
    return MtpWeights(
        token_norm=norm_spec(f"{prefix}.enorm", hidden),
        state_norm=norm_spec(f"{prefix}.hnorm", hidden),
        fc=TensorSpec(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)),
        layer=family_of(config).weight_specs(extended(config)).layers[-1],
        norm=norm_spec(f"{prefix}.shared_head.norm", hidden),
    )


def expert_layouts(config: ModelConfig, expert: int) -> tuple[Layout, ...]:
    """The ways in which one of the layer's experts may be stored."""
    return family_of(config).expert_layouts(extended(config), config.num_layers, expert)


def forward(
    head: MtpHead, tokens: jax.Array, state: jax.Array, kv: KVCache, rows: jax.Array, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, KVCache]:
    """One pass over T further rows of some sequences, as eagle.network.forward.

    tokens [b, T], each following state [b, T, M]; kv: one layer of B rows of cache; rows [b] int32: where these sequences'
    cache is, any number outside 0..B-1 is padding; lengths, num_new [b]: positions that their caches hold, and new ones.
    -> the states of the tokens [b, T, M], normed, and the cache with their keys and values.
    """
    config, weights = head.config, head.weights
    eps, valid = config.norm_eps, jnp.arange(tokens.shape[1]) < num_new[:, None]
    embedded = head.embed[tokens].astype(state.dtype)
    both = rms_norm(embedded, weights.token_norm, eps), rms_norm(state, weights.state_norm, eps)
    h = linear(jnp.concatenate(both, axis=-1), weights.fc)
    positions = lengths[:, None] + 1 + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # the token's, one after the state's
    projected = layers.pre_attention(config, weights.layer, h, positions)
    attended, kv = attend_rows(config.attention, *projected, kv, rows, lengths, num_new)
    h, x, routing = layers.post_attention(config, weights.layer, h, attended, valid)
    assert routing is not None  # the layer has experts
    h = layers.combine(h, expert_ffn(config.own_experts, x, head.experts, routing.ids), routing)
    return rms_norm(h, weights.norm, eps), kv


def logits(head: MtpHead, state: jax.Array) -> jax.Array:
    """[..., M], normed -> [..., V] float32."""
    return layers.output(head.output, state)


def head_bytes(config: ModelConfig, dtype: str) -> int:
    """Accelerator bytes of the layer's weights and all of its experts; what it borrows is the target's."""
    weights = sum(spec.bytes(dtype) for spec in spec_leaves(weight_specs(config)))
    return weights + config.num_experts * block_bytes(layer_config(config).own_experts, dtype)


def check_head(model: Model, head: MtpHead) -> None:
    """Raises PlanError when the layer borrows its embedding from another model."""
    if head.embed is not model.weights.embed:
        raise PlanError("the layer for further tokens is of another model; load this one's: checkpoints.load_mtp(model)")


def attach(model: Model, weights: MtpWeights[jax.Array], experts: jax.Array) -> MtpHead:
    """The layer of a model, which lends it embedding and output matrix."""
    return MtpHead(
        config=layer_config(model.config),
        weights=weights,
        experts=experts,
        embed=model.weights.embed,
        output=layers.output_matrix(model.weights),
    )


def random_head(model: Model, *, seed: int = 0) -> MtpHead:
    """A layer of random weights for a model, for tests."""
    config, shape = model.config, layer_config(model.config).own_experts.block_shape
    weights = map_specs(lambda spec: jnp.asarray(random_tensor(spec, seed), spec.in_dtype(model.dtype)), weight_specs(config))
    blocks = [random_block(expert_layouts(config, expert)[0], shape, seed, model.dtype) for expert in range(config.num_experts)]
    return attach(model, weights, jnp.stack(blocks))
