"""The training forward of a Mixtral: whole sequences, no cache, gradients.

Mixtral of Experts, Jiang et al. 2024; names and shapes of the exported tensors follow Hugging Face.
Letters: types.py; here C is an expert's capacity, the rows of one expert in a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.config.model_config import ModelConfig

INIT_STD = 0.02


class LayerParams(NamedTuple):
    """One decoder layer; matrices are [in, out].

    w1, w3 [E, M, F] and w2 [E, F, M] hold the differences of the experts from a common expert, base1, base3
    [M, F] and base2 [F, M]. The sum is what `merged` gives and what is exported. The common part sees every
    token, an expert only its own eighth, so it learns early what all experts need and the experts stay near
    enough to stand in for each other.
    """

    attention_norm: jax.Array  # [M]
    wq: jax.Array  # [M, H * D]
    wk: jax.Array  # [M, K * D]
    wv: jax.Array  # [M, K * D]
    wo: jax.Array  # [H * D, M]
    expert_norm: jax.Array  # [M]
    gate: jax.Array  # [M, E]
    w1: jax.Array
    w3: jax.Array
    w2: jax.Array
    base1: jax.Array
    base3: jax.Array
    base2: jax.Array


class Params(NamedTuple):
    embedding: jax.Array  # [V, M]
    layers: tuple[LayerParams, ...]
    norm: jax.Array  # [M]
    head: jax.Array  # [M, V]


class Experts(NamedTuple):
    """The experts of one layer as the model uses them: w1, w3 [E, M, F], w2 [E, F, M]."""

    w1: jax.Array
    w3: jax.Array
    w2: jax.Array


class LayerTrace(NamedTuple):
    """What one layer computed beside its output.

    ids [n, A] int32, the router's own choices; probabilities [n, E]; dropped: assignments over capacity;
    k, v [B, T, K, D].
    """

    ids: jax.Array
    probabilities: jax.Array
    dropped: jax.Array
    k: jax.Array
    v: jax.Array


def init_params(key: jax.Array, config: ModelConfig, *, common_experts: bool) -> Params:
    """Random weights. The key is consumed. Without `common_experts` the common part is zero and stays so."""
    keys = iter(jax.random.split(key, 2 + 11 * config.num_layers))

    def normal(*shape, std=INIT_STD):
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    model, hidden, experts = config.hidden_size, config.expert_hidden, config.num_experts
    queries, keyvalues = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Writers into the residual stream start smaller with depth (GPT-2), experts with 1/sqrt(fan in).
    out_std = INIT_STD / (2 * config.num_layers) ** 0.5
    in_std = model**-0.5
    part = 0.5 if common_experts else 1.0

    def layer():
        return LayerParams(
            attention_norm=jnp.ones(model),
            wq=normal(model, queries, std=in_std),
            wk=normal(model, keyvalues, std=in_std),
            wv=normal(model, keyvalues, std=in_std),
            wo=normal(queries, model, std=out_std),
            expert_norm=jnp.ones(model),
            gate=normal(model, experts),
            w1=normal(experts, model, hidden, std=part * in_std),
            w3=normal(experts, model, hidden, std=part * in_std),
            w2=normal(experts, hidden, model, std=part * out_std),
            base1=common_experts * normal(model, hidden, std=in_std),
            base3=common_experts * normal(model, hidden, std=in_std),
            base2=common_experts * normal(hidden, model, std=out_std),
        )

    return Params(
        embedding=normal(config.vocab_size, model),
        layers=tuple(layer() for _ in range(config.num_layers)),
        norm=jnp.ones(model),
        head=normal(model, config.vocab_size),
    )


def merged(layer: LayerParams) -> Experts:
    """The common part added to each expert."""
    return Experts(w1=layer.w1 + layer.base1, w3=layer.w3 + layer.base3, w2=layer.w2 + layer.base2)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions, halves convention. x [..., T, heads, D]; positions [..., T]."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * theta ** (-jnp.arange(half) / half)  # [..., T, D / 2]
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def project_qkv(x: jax.Array, positions: jax.Array, layer: LayerParams, config: ModelConfig):
    """x [..., T, M] -> q [..., T, K, H / K, D], k and v [..., T, K, D], rotated. H is grouped by its K head."""
    assert config.rope_theta is not None
    kv_shape = (*x.shape[:-1], config.num_kv_heads, config.head_dim)
    q = rotate((x @ layer.wq).reshape(*x.shape[:-1], config.num_heads, config.head_dim), positions, config.rope_theta)
    k = rotate((x @ layer.wk).reshape(kv_shape), positions, config.rope_theta)
    v = (x @ layer.wv).reshape(kv_shape)
    return q.reshape(*x.shape[:-1], config.num_kv_heads, -1, config.head_dim), k, v


def causal_attention(x: jax.Array, layer: LayerParams, config: ModelConfig):
    """x [B, T, M] -> [B, T, M], and the keys and values [B, T, K, D]."""
    length = x.shape[1]
    q, k, v = project_qkv(x, jnp.arange(length), layer, config)
    scores = jnp.einsum("btkgd,bskd->bkgts", q * config.head_dim**-0.5, k)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    out = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(*x.shape[:-1], -1) @ layer.wo, k, v


def route(x: jax.Array, gate: jax.Array, active: int):
    """Softmax over all experts, top-A, renormalised. x [n, M] -> ids, weights [n, A], probabilities [n, E]."""
    probabilities = jax.nn.softmax(x @ gate, axis=-1)
    weights, ids = jax.lax.top_k(probabilities, active)
    return ids, weights / jnp.sum(weights, axis=-1, keepdims=True), probabilities


def expert_ffn(x: jax.Array, experts: Experts) -> jax.Array:
    """Each expert on its own rows: [E, C, M] -> [E, C, M]."""
    hidden = jax.nn.silu(jnp.einsum("ecm,emf->ecf", x, experts.w1)) * jnp.einsum("ecm,emf->ecf", x, experts.w3)
    return jnp.einsum("ecf,efm->ecm", hidden, experts.w2)


def dispatch_ffn(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: Experts, capacity: int):
    """Rows sorted by expert into [E, C, M] and back; what exceeds an expert's capacity adds nothing.

    250 GF/s on two cores against 80 for tiles with gathered weights; ragged_dot is dense on XLA:CPU.
    x [n, M]; ids, weights [n, A] -> ([n, M], number dropped).
    """
    num_tokens, active = ids.shape
    num_experts = experts.w1.shape[0]
    flat = ids.reshape(-1)  # [n * A]
    order = jnp.argsort(flat)
    starts = jnp.searchsorted(flat[order], jnp.arange(num_experts))
    rank = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size) - starts[flat[order]])
    kept = rank < capacity
    slots = jnp.where(kept, flat * capacity + rank, num_experts * capacity)  # out of range = dropped
    sources = jnp.zeros(num_experts * capacity, jnp.int32).at[slots].set(jnp.arange(flat.size) // active, mode="drop")
    out = expert_ffn(x[sources].reshape(num_experts, capacity, -1), experts)
    rows = out.reshape(num_experts * capacity, -1)[jnp.minimum(slots, num_experts * capacity - 1)]  # [n * A, M]
    scaled = rows.reshape(num_tokens, active, -1) * jnp.where(kept.reshape(ids.shape), weights, 0.0)[..., None]
    return jnp.sum(scaled, axis=1), jnp.sum(~kept)


def dense_ffn(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
    """Every expert on every row: the slow twin of `dispatch_ffn`, which drops nothing. x [n, M] -> [n, M]."""
    num_experts = experts.w1.shape[0]
    combine = jnp.einsum("nae,na->ne", jax.nn.one_hot(ids, num_experts), weights)
    out = expert_ffn(jnp.broadcast_to(x, (num_experts, *x.shape)), experts)  # [E, n, M]
    return jnp.einsum("enm,ne->nm", out, combine)


def apply_experts(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: Experts, capacity_factor: float | None):
    """`dispatch_ffn` with room for `capacity_factor` times an even load, or `dense_ffn` without a factor."""
    if capacity_factor is None:
        return dense_ffn(x, ids, weights, experts), jnp.int32(0)
    return dispatch_ffn(x, ids, weights, experts, int(ids.size / experts.w1.shape[0] * capacity_factor))


def forward(
    params: Params, tokens: jax.Array, config: ModelConfig, *, capacity_factor: float | None = None, substitute=None
) -> tuple[jax.Array, list[LayerTrace]]:
    """Logits of every position, and what each layer did.

    tokens [B, T] int32 -> [B, T, V] float32. `substitute(ids [B, T, A], experts) -> [B, T, A]` replaces
    chosen experts before they are applied (self_draft.py); without a capacity factor nothing is dropped.
    """
    x = params.embedding[tokens]
    traces = []
    for layer in params.layers:
        attended, k, v = causal_attention(rms_norm(x, layer.attention_norm, config.norm_eps), layer, config)
        x = x + attended
        h = rms_norm(x, layer.expert_norm, config.norm_eps).reshape(-1, config.hidden_size)  # [n, M]
        ids, weights, probabilities = route(h, layer.gate, config.experts_per_token)
        experts = merged(layer)
        used = ids if substitute is None else substitute(ids.reshape(*tokens.shape, -1), experts).reshape(ids.shape)
        out, dropped = apply_experts(h, used, weights, experts, capacity_factor)
        x = x + out.reshape(x.shape)
        traces.append(LayerTrace(ids=ids, probabilities=probabilities, dropped=dropped, k=k, v=v))
    return rms_norm(x, params.norm, config.norm_eps) @ params.head, traces
