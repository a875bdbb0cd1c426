"""The layers that every family shares: pure functions over arrays, no cache, no offloading."""

import functools
import operator

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import AttentionConfig, Embedding, Head, LayerConfig
from specmoe_jax.models import latent, recurrent
from specmoe_jax.models.attention import scores_and_values, within
from specmoe_jax.models.basics import affine, biased, heads, linear, linears, norm, rms_norm, rope, sinusoids
from specmoe_jax.models.routing import route
from specmoe_jax.models.selection import handed
from specmoe_jax.models.spec import CrossWeights, LayerWeights, MlpWeights, Weights
from specmoe_jax.types import CrossCache, Routing, Tree


def positions_of(lengths: jax.Array, width: int, tree: Tree | None) -> jax.Array:
    """[B, width] int32: lengths[b] + t, or + depth in a tree."""
    return lengths[:, None] + (jnp.arange(width, dtype=jnp.int32) if tree is None else tree.depths)


def embed(
    weights: Weights[jax.Array], token_ids: jax.Array, positions: jax.Array | None = None, config: Embedding | None = None
) -> jax.Array:
    """[B, T] int32 -> [B, T, M]; scaled, and with sinusoids of `positions` [B, T], where the config says so."""
    h = weights.embed[token_ids]
    if config is None:
        return h
    h = h * jnp.asarray(config.scale, h.dtype)
    if config.pad_id is None:
        return h
    assert positions is not None  # sinusoids have them
    places = sinusoids(positions + config.pad_id + 1, h.shape[-1])
    return h + jnp.where(token_ids[..., None] == config.pad_id, 0, places).astype(h.dtype)


def pre_attention(
    config: LayerConfig, weights: LayerWeights[jax.Array], h: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm, projections and RoPE ("other1" of SpecMoEOff). h [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D].

    Gated queries are [B, T, H, 2 D]; of a recurrent layer: see recurrent.project. A choice of positions behind h goes behind q.
    """
    assert weights.input_norm is not None
    h, taken = handed.apart(config.attention, h)
    x = norm(h, weights.input_norm, weights.input_norm_bias, config.norm_eps, config.norm_plus)
    q, k, v = queries_keys_values(config, weights, x, positions)
    if taken is not None:
        q = jnp.concatenate([q, handed.by_heads(config.attention, taken)], axis=-1)
    return q, k, v


def queries_keys_values(
    config: LayerConfig, weights: LayerWeights[jax.Array], x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`pre_attention` of what is normed already (or, in EAGLE's layer, never is). x [B, T, in]."""
    if config.attention.latent is not None:
        return latent.project(config.attention, weights, x, positions)
    if config.attention.recurrent is not None:
        return recurrent.project(config.attention.recurrent, weights, x)
    attention = config.attention
    assert weights.k is not None and weights.v is not None  # without latent attention
    q, k, v = linears(x, weights.q, weights.k, weights.v)
    q, gate = split_gate(attention, biased(q, weights.q_bias))
    q = heads(_normed(config, q, weights.q_norm), attention.num_heads)
    k = heads(_normed(config, biased(k, weights.k_bias), weights.k_norm), attention.num_kv_heads)
    v = heads(biased(v, weights.v_bias), attention.num_kv_heads)
    if attention.value_scale != 1.0:
        v = v * attention.value_scale
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, attention.head_dim - attention.output_dim)))
    q, k = rope((q, k), positions, attention.rope)
    if attention.l2_norm:
        q, k = (rms_norm(a, jnp.ones((), a.dtype), config.norm_eps) for a in (q, k))
    q = _tempered(attention, q, positions)
    return q if gate is None else jnp.concatenate([q, heads(gate, attention.num_heads)], axis=-1), k, v


def post_attention(
    config: LayerConfig,
    weights: LayerWeights[jax.Array],
    h: jax.Array,
    attended: jax.Array,
    valid: jax.Array,
    cross: CrossCache | None = None,
) -> tuple[jax.Array, jax.Array, Routing | None]:
    """Output projection, residual, cross attention, norm, dense or shared MLP and router ("other2" of SpecMoEOff).

    h: [B, T, M]; attended: [B, T, H, D]; valid: [B, T] bool, False for padding and finished rows.
    Returns h with all but the routed experts added [B, T, M], the experts' input x [n, M] and the routing of its rows,
    None for a layer without experts. A choice of positions goes behind h where the next layer takes it.
    """
    h, taken = handed.apart(config.attention, h)
    chosen = attended
    if config.attention.latent is not None:
        attended = latent.values(config.attention, weights, attended)
    if config.attention.recurrent is not None:
        attended = recurrent.values(config, weights, attended)
    if config.attention.value_dim is not None:
        attended = attended[..., : config.attention.value_dim]
    h = h + config.residual_scale * affine(attended.reshape(*h.shape[:2], -1), weights.o, weights.o_bias)
    if config.cross is not None:
        assert weights.cross is not None and cross is not None
        h = h + _cross_attention(config.cross, config.norm_eps, weights.cross, h, cross)
    x = norm(h, weights.post_norm, weights.post_norm_bias, config.norm_eps, config.norm_plus)
    if weights.mlp is not None:
        h = h + config.residual_scale * _gated(mlp(weights.mlp, x), x, weights.shared_gate)
    x, h = x.reshape(-1, x.shape[-1]), handed.behind(config.attention, h, chosen, taken)  # x [n, M]
    if config.router is None:
        return h, x, None
    return h, *_routed(config, x, _route(config, weights, x, valid.reshape(-1)))


def mlp(weights: MlpWeights[jax.Array], x: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer 2020) of x [..., M], or ReLU where there is no gate: a dense layer's, or the shared expert's."""
    if weights.gate is None:
        return affine(jax.nn.relu(affine(x, weights.up, weights.up_bias)), weights.down, weights.down_bias)
    gate, up = linears(x, weights.gate, weights.up)
    return linear(jax.nn.silu(gate) * up, weights.down)


def reroute(config: LayerConfig, weights: LayerWeights[jax.Array], x: jax.Array, routing: Routing, allowed: jax.Array) -> Routing:
    """The routing of the same rows x [n, M] among the allowed experts [E] bool alone.

    Where weights are on the input (Llama-4), x keeps that of the first routing: a draft may.
    """
    again = _route(config, weights, x, routing.ids[:, 0] >= 0, allowed)
    return again._replace(weights=routing.weights) if config.own_router.on_input else again


def combine(h: jax.Array, expert_outputs: jax.Array, routing: Routing) -> jax.Array:
    """Adds the weighted expert outputs [n, A, M] to the residual h [B, T, M], always in the order of the choices.

    What goes behind h stays as it is.
    """
    choices = range(expert_outputs.shape[1])
    # Additions, not a sum over an axis, for which XLA:CPU took 110 us (one token, 8 choices, two cores).
    parts = (expert_outputs[:, a] * routing.weights[:, a, None] for a in choices)
    mixed = functools.reduce(operator.add, parts)  # [n, M]
    hidden = mixed.shape[-1]
    mixed = mixed.reshape(*h.shape[:2], hidden).astype(h.dtype)
    if h.shape[-1] == hidden:
        return h + mixed
    return jnp.concatenate([h[..., :hidden] + mixed, h[..., hidden:]], axis=-1)


def head(config: Head, weights: Weights[jax.Array], h: jax.Array) -> jax.Array:
    """Final norm and output matrix. h [B, T, M] -> logits [B, T, V] float32."""
    return output(output_matrix(weights), final_norm(config, weights, h)) / config.divisor


def final_norm(config: Head, weights: Weights[jax.Array], h: jax.Array) -> jax.Array:
    """The last hidden state, which is EAGLE's feature: after the final norm, before the output matrix. h [..., M]."""
    return norm(h, weights.final_norm, weights.final_norm_bias, config.norm_eps, config.norm_plus)


def output(matrix: jax.Array | ops.PackedMatrix, x: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of x [..., M] by an output matrix [V, M]."""
    return ops.dense_product(x, matrix)


def output_matrix(weights: Weights[jax.Array]) -> jax.Array | ops.PackedMatrix:
    """[V, M], the embedding where they are tied."""
    return weights.embed if weights.lm_head is None else weights.lm_head


def cross_cache(config: LayerConfig, weights: LayerWeights[jax.Array], encoded: jax.Array, lengths: jax.Array) -> CrossCache:
    """What a decoder layer attends of the encoder's output [B, S, M], of which row b has lengths[b] positions."""
    assert config.cross is not None and weights.cross is not None
    k = heads(affine(encoded, weights.cross.k, weights.cross.k_bias), config.cross.num_kv_heads)
    v = heads(affine(encoded, weights.cross.v, weights.cross.v_bias), config.cross.num_kv_heads)
    return CrossCache(k=k.swapaxes(1, 2), v=v.swapaxes(1, 2), lengths=lengths)


def _cross_attention(
    config: AttentionConfig, norm_eps: float, weights: CrossWeights[jax.Array], h: jax.Array, cross: CrossCache
) -> jax.Array:
    """h [B, T, M] attends all that the encoder read -> [B, T, M]."""
    x = norm(h, weights.norm, weights.norm_bias, norm_eps)
    q = heads(affine(x, weights.q, weights.q_bias), config.num_heads)
    attended = scores_and_values(config, q, cross.k, cross.v, within(cross.lengths, h.shape[1], cross.k.shape[2]), None)
    return affine(attended.reshape(*h.shape[:2], -1), weights.o, weights.o_bias)


def _normed(config: LayerConfig, x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Query or key norm over as many numbers as it has weights: a head's (Qwen3), or all heads' (OLMoE). None: as it is."""
    if weight is None:
        return x
    apart = x.reshape(*x.shape[:-1], -1, weight.shape[0])
    return rms_norm(apart, weight, config.norm_eps, config.norm_plus).reshape(x.shape)


def split_gate(config: AttentionConfig, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Projected [B, T, H * query_dim] -> queries and their gates [B, T, H * D] each; None where there are none."""
    if not config.gated:
        return q, None
    q, gate = jnp.split(heads(q, config.num_heads), 2, axis=-1)
    return q.reshape(*q.shape[:2], -1), gate.reshape(*gate.shape[:2], -1)


def _tempered(config: AttentionConfig, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries that grow with the logarithm of their position (Llama-4, layers without rotary positions)."""
    if config.temperature is None:
        return q
    floor, scale = config.temperature
    factor = jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / floor)) * scale + 1
    return (q * factor[..., None, None]).astype(q.dtype)


def _gated(y: jax.Array, x: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The shared expert's output y, times sigmoid(gate x) where the family has that gate [1, M] (Qwen2-MoE)."""
    return y if gate is None else y * jax.nn.sigmoid(linear(x, gate))


def _route(
    config: LayerConfig, weights: LayerWeights[jax.Array], x: jax.Array, valid: jax.Array, allowed: jax.Array | None = None
) -> Routing:
    assert weights.router is not None
    return route(config.own_router, x, weights.router, weights.router_bias, valid, allowed, weights.choice_bias)


def _routed(config: LayerConfig, x: jax.Array, routing: Routing) -> tuple[jax.Array, Routing]:
    """Moves the weights from the experts' outputs to their input where the family wants it (Llama-4, one expert a token)."""
    if not config.own_router.on_input:
        return x, routing
    return x * routing.weights.astype(x.dtype), routing._replace(weights=jnp.ones_like(routing.weights))
