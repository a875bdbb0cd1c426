"""The layer that a model ships to predict further tokens (DeepSeek-V3, 2.2: multi-token prediction), as a draft head.

Row i holds the target's last hidden state of position i, after the final norm, beside the token after it. Both are normed
and projected to one vector, which an ordinary layer of the target, attention and experts, makes into the state of position
i + 1, after a norm of the layer's own; the target's output matrix turns that into logits of the token at i + 2. Further
tokens come from the layer's own states. Measured on several models by others, and so here: both kinds of state are taken
after their norm, which accepts more than before it (Qwen3.5: 2.7 tokens a pass against 1.8).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.attention import attend, attend_rows, behind
from specmoe_jax.models.basics import linear, rms_norm
from specmoe_jax.models.experts import block_bytes, expert_ffn
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.packing import pack
from specmoe_jax.models.published.naming import mtp_prefixes, norm_spec
from specmoe_jax.models.spec import LayerWeights, Layout, Leaf, TensorSpec, map_specs, random_block, random_tensor, spec_leaves
from specmoe_jax.ops import PackedMatrix
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import Grown, KVCache


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
    """The loaded layer. experts: all of them, [E, *block_shape], on the accelerator, or None where it has a dense MLP.

    Of experts in host memory it is a block of each, and the layer cannot run until some are on the accelerator
    (engine.drafts.hot_mtp): [n, *block_shape], and slots says which, [E] int32, the place of each expert or -1; the router
    chooses among those alone.
    embed, output: the target's, [V, M]. further: the layers for the tokens after the first, in turn; without any, this one
    feeds itself.
    """

    config: LayerConfig = struct.field(pytree_node=False)
    weights: MtpWeights[jax.Array]
    experts: jax.Array | tuple[jax.Array, ...] | None
    embed: jax.Array
    output: jax.Array | PackedMatrix
    further: tuple["MtpHead", ...] = ()
    slots: jax.Array | None = None

    @property
    def chain(self) -> tuple["MtpHead", ...]:
        """All layers, each without the others."""
        return (dataclasses.replace(self, further=()), *self.further)


class Layer(NamedTuple):
    """One of the layers, apart from what it borrows of the target. As MtpHead."""

    config: LayerConfig
    weights: MtpWeights[jax.Array]
    experts: jax.Array | tuple[jax.Array, ...] | None


def extended(config: ModelConfig) -> ModelConfig:
    """The model with these layers after its last one, as checkpoints count: their tensors then have specs like any other's.

    Their experts are not packed.
    """
    layer = layer_config(config)
    count, layers = config.num_layers + config.mtp_layers, (layer,) * config.mtp_layers
    return dataclasses.replace(config, num_layers=count, layer_configs=(*config.layers, *layers), mtp_layers=0)


def layer_config(config: ModelConfig, expert_dtype: str | None = None) -> LayerConfig:
    """What a layer computes: it is like the last one that attends and has experts, wherever others are, unless the family says.

    expert_dtype: what its experts are packed as (Plan.draft_expert_dtype).
    """
    own = getattr(family_of(config), "further_layer", None)
    last = [layer for layer in config.moe_layers if layer not in config.recurrent_layers][-1]
    layer = config.layers[last] if own is None else own(config)
    if layer.experts is None:
        return layer
    return dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, packing=expert_dtype))


def weight_specs(config: ModelConfig, index: int = 0) -> MtpWeights[TensorSpec]:
    """Names and shapes beside the experts' of one of the layers."""
    prefix, hidden = mtp_prefixes(config)[index].removesuffix("."), config.hidden_size
    return MtpWeights(
        token_norm=norm_spec(f"{prefix}.enorm", hidden),
        state_norm=norm_spec(f"{prefix}.hnorm", hidden),
        fc=TensorSpec(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)),
        layer=family_of(config).weight_specs(extended(config)).layers[config.num_layers + index],
        norm=norm_spec(f"{prefix}.shared_head.norm", hidden),
    )


def all_weight_specs(config: ModelConfig) -> tuple[MtpWeights[TensorSpec], ...]:
    """Of all layers."""
    return tuple(weight_specs(config, index) for index in range(config.mtp_layers))


def expert_layouts(config: ModelConfig, expert: int, index: int = 0) -> tuple[Layout, ...]:
    """The ways in which one of a layer's experts may be stored."""
    return family_of(config).expert_layouts(extended(config), config.num_layers + index, expert)


def forward(
    head: MtpHead, tokens: jax.Array, state: jax.Array, kv: KVCache, rows: jax.Array, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, KVCache]:
    """One pass over T further rows of some sequences, as eagle.network.forward.

    tokens [b, T], each following state [b, T, M]; kv: one layer of B rows of cache; rows [b] int32: where these sequences'
    cache is, any number outside 0..B-1 is padding; lengths, num_new [b]: positions that their caches hold, and new ones.
    -> the states of the tokens [b, T, M], normed, and the cache with their keys and values.
    """
    return forward_routed(head, tokens, state, kv, rows, lengths, num_new)[:2]


def forward_routed(
    head: MtpHead, tokens: jax.Array, state: jax.Array, kv: KVCache, rows: jax.Array, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """As `forward`, and the experts that the router chose of all [b * T, A], -1 for padding; None where there are none."""
    h, projected = _project(head, tokens, state, lengths, jnp.arange(tokens.shape[1], dtype=jnp.int32))
    sinks, valid = head.weights.layer.sinks, jnp.arange(tokens.shape[1]) < num_new[:, None]
    attended, kv = attend_rows(head.config.attention, *projected, kv, rows, lengths, num_new, sinks=sinks)
    states, chosen = _finish(head, h, attended, valid)
    return states, kv, chosen


def forward_tree(
    head: MtpHead, tokens: jax.Array, state: jax.Array, grown: Grown, kv: KVCache, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, Grown, KVCache]:
    """One generation of a tree in every row: tokens [B, k], each with the state [B, k, M] of its parent.

    grown: the generations before it, whose keys stand again at lengths[b] on; tree: of all nodes, this generation last.
    num_new [B]: 1 for rows that draft. -> the states of the tokens, grown with this generation, and the cache.
    """
    width, config, sinks = tokens.shape[1], head.config.attention, head.weights.layer.sinks
    h, projected = _project(head, tokens, state, lengths, grown.tree.depths[:, -width:])
    q, k, v = behind(grown, *projected)
    attended, k_cache, v_cache = attend(config, q, k, v, sinks, kv.k[0], kv.v[0], lengths, num_new * k.shape[1], grown.tree)
    outputs, _ = _finish(head, h, attended[:, -width:], jnp.broadcast_to(num_new[:, None] > 0, tokens.shape))
    return outputs, Grown(k=k, v=v, tree=grown.tree), KVCache(k=(k_cache,), v=(v_cache,))


def _project(head: MtpHead, tokens: jax.Array, state: jax.Array, lengths: jax.Array, depths: jax.Array):
    """The layer as far as its attention; depths: of the tokens beyond lengths[b]. -> h [B, T, M], and q, k, v."""
    config, weights = head.config, head.weights
    embedded = head.embed[tokens].astype(state.dtype)
    norms = ((embedded, weights.token_norm), (state, weights.state_norm))
    both = (rms_norm(x, weight, config.norm_eps, config.norm_plus) for x, weight in norms)
    h = linear(jnp.concatenate(tuple(both), axis=-1), weights.fc)
    positions = lengths[:, None] + 1 + depths  # the token's, one after the state's
    return h, layers.pre_attention(config, weights.layer, h, positions)


def _finish(head: MtpHead, h: jax.Array, attended: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The layer after its attention -> states [B, T, M], normed, and what the router chose of all experts."""
    config, weights = head.config, head.weights
    h, x, routing = layers.post_attention(config, weights.layer, h, attended, valid)
    if routing is None:
        return rms_norm(h, weights.norm, config.norm_eps, config.norm_plus), None
    assert isinstance(head.experts, jax.Array)  # on the accelerator
    chosen = slots = routing.ids
    if head.slots is not None:
        routing = layers.reroute(config, weights.layer, x, routing, head.slots >= 0)
        slots = jnp.where(routing.ids < 0, -1, head.slots[routing.ids])
        routing = routing._replace(weights=jnp.where(slots < 0, 0.0, routing.weights))  # none may be there
    h = layers.combine(h, expert_ffn(config.own_experts, x, head.experts, slots), routing)
    return rms_norm(h, weights.norm, config.norm_eps, config.norm_plus), chosen


def logits(head: MtpHead, state: jax.Array) -> jax.Array:
    """[..., M], normed -> [..., V] float32."""
    return layers.output(head.output, state)


def head_bytes(config: ModelConfig, dtype: str, expert_dtype: str | None = None, *, hot: int | None = None) -> int:
    """Accelerator bytes of the layers' weights and all, or `hot`, of their experts; what they borrow is the target's."""
    weights = sum(spec.bytes(dtype) for specs in all_weight_specs(config) for spec in spec_leaves(specs))
    return weights + experts_bytes(config, dtype, expert_dtype, count=hot)


def experts_bytes(config: ModelConfig, dtype: str, expert_dtype: str | None = None, *, count: int | None = None) -> int:
    """Of so many experts, or of all, of each of the layers."""
    layer = layer_config(config, expert_dtype)
    if layer.experts is None:
        return 0
    return config.mtp_layers * (config.num_experts if count is None else count) * block_bytes(layer.experts, dtype)


def check_head(model: Model, head: MtpHead) -> None:
    """Raises PlanError when the layer borrows its embedding from another model."""
    if head.embed is not model.weights.embed:
        raise PlanError("the layer for further tokens is of another model; load this one's: checkpoints.load_mtp(model)")


def attach(model: Model, found: Sequence[Layer]) -> MtpHead:
    """The layers of a model, which lends them embedding and output matrix."""
    borrowed: dict[str, Any] = {"embed": model.weights.embed, "output": layers.output_matrix(model.weights)}
    first, *further = (MtpHead(**layer._asdict(), **borrowed) for layer in found)
    return dataclasses.replace(first, further=tuple(further))


def in_memory(
    config: LayerConfig, blocks: Sequence[np.ndarray], *, on_host: bool = False
) -> jax.Array | tuple[jax.Array, ...] | None:
    """Experts as MtpHead has them, packed as the config says; None without any. blocks: as models.spec has them."""
    if config.experts is None:
        return None
    packs = config.experts.packing is not None
    packed = [pack(config.experts, block) if packs else block for block in blocks]
    return tuple(map(to_host, packed)) if on_host else jnp.stack([jnp.asarray(block) for block in packed])


def random_head(model: Model, *, seed: int = 0, expert_dtype: str | None = None, experts_on_host: bool = False) -> MtpHead:
    """Layers of random weights for a model, for tests."""
    config, layer = model.config, layer_config(model.config, expert_dtype)

    def one(index: int) -> Layer:
        specs, blocks = weight_specs(config, index), []
        weights = map_specs(lambda spec: jnp.asarray(random_tensor(spec, seed), spec.in_dtype(model.dtype)), specs)
        if layer.experts is not None:
            layouts = (expert_layouts(config, expert, index)[0] for expert in range(config.num_experts))
            blocks = [random_block(layout, layer.experts.block_shape, seed, model.dtype) for layout in layouts]
        return Layer(layer, weights, in_memory(layer, blocks, on_host=experts_on_host))

    return attach(model, [one(index) for index in range(config.mtp_layers)])
