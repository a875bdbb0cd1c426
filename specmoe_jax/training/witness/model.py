"""The training forward of a glm4_moe: whole sequences, no cache, gradients.

GLM-4.5 (Zeng et al. 2025) with its MTP layer (DeepSeek-V3, section 2.2); transformers' Glm4MoeForCausalLM computes the same.
Letters: types.py; n = B * T tokens, C an expert's capacity.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.training.witness import attention, dispatch
from specmoe_jax.training.witness.config import WitnessConfig

INIT_STD = 0.02


class Attention(NamedTuple):
    """Matrices are [in, out]."""

    wq: jax.Array  # [M, H * D]
    wk: jax.Array  # [M, K * D]
    wv: jax.Array  # [M, K * D]
    wo: jax.Array  # [H * D, M]
    q_norm: jax.Array  # [D]
    k_norm: jax.Array  # [D]


class Mlp(NamedTuple):
    """A gated MLP, or with a leading [E] all routed experts of a layer."""

    w_gate: jax.Array  # [M, F]
    w_up: jax.Array  # [M, F]
    w_down: jax.Array  # [F, M]


class Experts(NamedTuple):
    router: jax.Array  # [M, E]
    routed: Mlp
    shared: Mlp


class Layer(NamedTuple):
    attention_norm: jax.Array  # [M]
    attention: Attention
    ffn_norm: jax.Array  # [M]
    ffn: Mlp | Experts


class Mtp(NamedTuple):
    """Predicts the token after the next from the final hidden state and the next token's embedding."""

    embedding_norm: jax.Array  # [M]
    hidden_norm: jax.Array  # [M]
    projection: jax.Array  # [2M, M], the embedding's half first
    layer: Layer
    norm: jax.Array  # [M]


class Params(NamedTuple):
    embedding: jax.Array  # [V, M]
    layers: tuple[Layer, ...]
    norm: jax.Array  # [M]
    head: jax.Array  # [M, V]
    mtp: Mtp


class Routing(NamedTuple):
    """What one router chose: scores [n, E], without the bias; ids [n, A] int32; load [E] float32, choices of each expert;
    dropped: choices without room."""

    scores: jax.Array
    ids: jax.Array
    load: jax.Array
    dropped: jax.Array


def init_params(seed: int, config: WitnessConfig) -> Params:
    """Random weights, drawn by NumPy: as many draws of JAX compile for longer than a training step."""
    rng = np.random.default_rng(seed)
    model, in_std = config.hidden_size, config.hidden_size**-0.5
    # Writers into the residual stream start smaller with depth (GPT-2), the others with 1/sqrt(fan in).
    out_std = INIT_STD / (2 * config.num_layers) ** 0.5

    def normal(*shape, std=in_std):
        return jnp.asarray(std * rng.standard_normal(shape, np.float32), jnp.float32)

    def mlp(*shape):
        *experts, hidden = shape
        return Mlp(
            w_gate=normal(*experts, model, hidden),
            w_up=normal(*experts, model, hidden),
            w_down=normal(*experts, hidden, model, std=out_std),
        )

    def experts():
        return Experts(
            router=normal(model, config.num_experts, std=INIT_STD),
            routed=mlp(config.num_experts, config.expert_hidden),
            shared=mlp(config.expert_hidden),
        )

    def layer(dense: bool):
        queries, keyvalues = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = Attention(
            wq=normal(model, queries),
            wk=normal(model, keyvalues),
            wv=normal(model, keyvalues),
            wo=normal(queries, model, std=out_std),
            q_norm=jnp.ones(config.head_dim),
            k_norm=jnp.ones(config.head_dim),
        )
        ffn = mlp(config.dense_hidden) if dense else experts()
        return Layer(attention_norm=jnp.ones(model), attention=attention, ffn_norm=jnp.ones(model), ffn=ffn)

    return Params(
        embedding=normal(config.vocab_size, model, std=INIT_STD),
        layers=tuple(layer(dense=i == 0) for i in range(config.num_layers)),
        norm=jnp.ones(model),
        head=normal(model, config.vocab_size, std=INIT_STD),
        mtp=Mtp(
            embedding_norm=jnp.ones(model),
            hidden_norm=jnp.ones(model),
            projection=normal(2 * model, model, std=(2 * model) ** -0.5),
            layer=layer(dense=False),
            norm=jnp.ones(model),
        ),
    )


def init_bias(config: WitnessConfig) -> jax.Array:
    """The routers' balancing biases [L, E]: rows of layers 1 to L - 1, then the MTP layer's."""
    return jnp.zeros((config.num_moe_layers, config.num_experts))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: jax.Array, positions: jax.Array, config: WitnessConfig) -> jax.Array:
    """Rotary positions on the first rotary_dim columns, halves convention. x [B, T, heads, D]; positions [T]."""
    half = config.rotary_dim // 2
    angles = positions[:, None] * config.rope_theta ** (-jnp.arange(half) / half)  # [T, half]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


def project(
    x: jax.Array, weights: Attention, positions: jax.Array, config: WitnessConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, M], positions [T] -> scaled queries [B, T, K, G, D], keys and values [B, T, K, D]; G = H / K."""
    batch, length, _ = x.shape
    # One product for the three: 0.83 of their processor time.
    projected = x @ jnp.concatenate([weights.wq, weights.wk, weights.wv], axis=-1)
    queries, keyvalues = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v = jnp.split(projected, [queries, queries + keyvalues], axis=-1)

    def heads(rows, norm=None):
        rows = rows.reshape(batch, length, -1, config.head_dim)
        return rows if norm is None else rotate(rms_norm(rows, norm, config.norm_eps), positions, config)

    q = heads(q, weights.q_norm) * config.head_dim**-0.5
    q = q.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
    return q, heads(k, weights.k_norm), heads(v)


def attend(x: jax.Array, weights: Attention, config: WitnessConfig) -> jax.Array:
    """Causal grouped-query attention of whole sequences. x [B, T, M] -> [B, T, M]."""
    mixed = attention.causal(*project(x, weights, jnp.arange(x.shape[1]), config))
    return mixed.reshape(*x.shape[:2], -1) @ weights.wo


def gated(x: jax.Array, weights: Mlp) -> jax.Array:
    """silu(x w_gate) * (x w_up). x [n, M], or [E, n, M] with experts -> [..., F]."""
    # One product for both: 0.93 of their processor time.
    hidden = x @ jnp.concatenate([weights.w_gate, weights.w_up], axis=-1)
    width = weights.w_gate.shape[-1]
    return jax.nn.silu(hidden[..., :width]) * hidden[..., width:]


def mlp(x: jax.Array, weights: Mlp) -> jax.Array:
    return gated(x, weights) @ weights.w_down


def route(scores: jax.Array, bias: jax.Array, config: WitnessConfig) -> tuple[jax.Array, jax.Array]:
    """The bias takes part in the choice alone (Wang et al. 2024). scores [n, E] -> ids, weights [n, A]."""
    ids = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, config.experts_per_token)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, weights / jnp.sum(weights, axis=-1, keepdims=True) * config.routed_scale


def routed_ffn(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: Mlp, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The chosen experts on their rows; a choice beyond an expert's capacity adds nothing. -> [n, M], number dropped."""
    num_experts = experts.w_gate.shape[0]
    slots = dispatch.seat(ids, num_experts, capacity)
    rows = dispatch.spread(x, slots).reshape(num_experts, capacity, -1)
    # Weighted here, where a row is F wide, not after the product, where it is M wide.
    hidden = gated(rows, experts) * dispatch.slot_weights(weights, slots).reshape(num_experts, capacity, 1)
    out = hidden @ experts.w_down  # [E, C, M]
    return dispatch.collect(out.reshape(num_experts * capacity, -1), slots), jnp.sum(slots.slots == num_experts * capacity)


def every_expert(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: Mlp) -> jax.Array:
    """Every expert on every row: the slow reference of `routed_ffn`, which drops nothing. x [n, M] -> [n, M]."""
    combine = jnp.einsum("nae,na->en", jax.nn.one_hot(ids, experts.w_gate.shape[0]), weights)
    hidden = jax.nn.silu(jnp.einsum("nm,emf->enf", x, experts.w_gate)) * jnp.einsum("nm,emf->enf", x, experts.w_up)
    return jnp.einsum("enf,efm->nm", hidden * combine[..., None], experts.w_down)


def run_experts(x: jax.Array, weights: Experts, bias: jax.Array, config: WitnessConfig, capacity_factor: float | None):
    """x [n, M] -> [n, M], Routing. Without a capacity factor every choice finds room."""
    scores = jax.nn.sigmoid(x @ weights.router)
    ids, chosen = route(scores, bias, config)
    if capacity_factor is None:
        out, dropped = every_expert(x, ids, chosen, weights.routed), jnp.int32(0)
    else:
        capacity = int(ids.size / config.num_experts * capacity_factor)
        out, dropped = routed_ffn(x, ids, chosen, weights.routed, capacity)
    load = jnp.sum(jax.nn.one_hot(ids, config.num_experts), axis=(0, 1))
    return out + mlp(x, weights.shared), Routing(scores=scores, ids=ids, load=load, dropped=dropped)


def run_layer(x: jax.Array, layer: Layer, bias: jax.Array, config: WitnessConfig, capacity_factor, mix: Callable):
    """One decoder layer. x [B, T, M]; mix(x, Attention) [B, T, M] attends -> [B, T, M], Routing or None where it is dense."""
    x = x + mix(rms_norm(x, layer.attention_norm, config.norm_eps), layer.attention)
    h = rms_norm(x, layer.ffn_norm, config.norm_eps)
    if isinstance(layer.ffn, Mlp):
        return x + mlp(h, layer.ffn), None
    out, routing = run_experts(h.reshape(-1, config.hidden_size), layer.ffn, bias, config, capacity_factor)
    return x + out.reshape(x.shape), routing


def hidden_states(params: Params, bias: jax.Array, tokens: jax.Array, config: WitnessConfig, capacity_factor=None):
    """tokens [B, T] int32 -> the final hidden states after the norm [B, T, M], Routings of layers 1 to L - 1."""
    x, routings, mix = params.embedding[tokens], [], functools.partial(attend, config=config)
    for index, layer in enumerate(params.layers):
        x, routing = run_layer(x, layer, bias[max(index - 1, 0)], config, capacity_factor, mix)
        routings += [] if routing is None else [routing]
    return rms_norm(x, params.norm, config.norm_eps), routings


def mtp_states(
    params: Params, bias: jax.Array, hidden: jax.Array, following: jax.Array, config: WitnessConfig, capacity_factor=None
):
    """States from which the head predicts the token after `following`. hidden [B, T, M], of positions 0 to T - 1;
    following [B, T] int32, the tokens of positions 1 to T -> [B, T, M], Routing."""
    mtp, eps = params.mtp, config.norm_eps
    embedded = rms_norm(params.embedding[following], mtp.embedding_norm, eps)
    x = jnp.concatenate([embedded, rms_norm(hidden, mtp.hidden_norm, eps)], axis=-1) @ mtp.projection
    # Relative positions alone matter, so row p of the layer may be rotated by p although it stands at p + 1.
    x, routing = run_layer(x, mtp.layer, bias[-1], config, capacity_factor, functools.partial(attend, config=config))
    return rms_norm(x, mtp.norm, eps), routing


def logits(params: Params, bias: jax.Array, tokens: jax.Array, config: WitnessConfig) -> jax.Array:
    """tokens [B, T] int32 -> [B, T, V] float32, nothing dropped."""
    return hidden_states(params, bias, tokens, config)[0] @ params.head
