"""The compiled pieces of a pass. One program per stage and shape, shared by all layers.

Per-layer programs over per-layer buffers compile once whatever the depth, and the host can act between them;
a scan over stacked weights copies each layer's slice (3x slower on CPU).
"""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.spec import LayerWeights
from specmoe_jax.speculate.substitution import DistinctSlots, DraftSlots, MaskedSlots, choose_distinct
from specmoe_jax.types import Routing

embed = jax.jit(layers.embed)
head = functools.partial(jax.jit, static_argnums=0)(layers.head)


@functools.partial(jax.jit, static_argnums=0)
def pre_attention(config: ModelConfig, weights: LayerWeights, h: jax.Array, lengths: jax.Array):
    """h [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D], rotated to positions lengths[b] + t."""
    with jax.named_scope("pre_attention"):
        positions = lengths[:, None] + jnp.arange(h.shape[1], dtype=jnp.int32)
        return layers.pre_attention(config, weights, h, positions)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def attend(config: ModelConfig, q, k, v, k_cache, v_cache, lengths, num_new):
    """Appends k, v to the caches [B, K, S, D] (donated) and attends. -> attended [B, T, H, D], caches."""
    with jax.named_scope("attend"):
        return ops.chunked_attention(
            q, k, v, k_cache, v_cache, lengths, num_new=num_new, window=config.sliding_window
        )


@functools.partial(jax.jit, static_argnums=0)
def post_attention(config: ModelConfig, weights: LayerWeights, h, attended, num_new):
    """-> h [B, T, M], the experts' input x [n, M] and its Routing; rows t >= num_new[b] route nowhere."""
    with jax.named_scope("post_attention"):
        valid = jnp.arange(h.shape[1], dtype=jnp.int32) < num_new[:, None]
        return layers.post_attention(config, weights, h, attended, valid)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def attention(config: ModelConfig, weights: LayerWeights, h, k_cache, v_cache, lengths, num_new):
    """The three stages above as one program, for a cache on the accelerator (donated)."""
    q, k, v = pre_attention(config, weights, h, lengths)
    attended, k_cache, v_cache = attend(config, q, k, v, k_cache, v_cache, lengths, num_new)
    return *post_attention(config, weights, h, attended, num_new), k_cache, v_cache


@jax.jit
def experts(h: jax.Array, x: jax.Array, routing: Routing, pool: jax.Array, slots: jax.Array) -> jax.Array:
    """All chosen experts at once. h [B, T, M]; pool [R, 3, F, M]; slots [E] -> h [B, T, M]."""
    with jax.named_scope("experts"):
        return layers.combine(h, ops.expert_ffn(x, pool, choose_slots(routing.ids, slots)), routing)


@functools.partial(jax.jit, donate_argnums=0)
def experts_wave(outputs: jax.Array, x: jax.Array, ids: jax.Array, pool: jax.Array, slots: jax.Array) -> jax.Array:
    """Adds the experts of one wave to outputs [n, A, M]; every entry gets exactly one non-zero summand."""
    with jax.named_scope("experts_wave"):
        return outputs + ops.expert_ffn(x, pool, choose_slots(ids, slots))


combine = jax.jit(layers.combine)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def layer(config: ModelConfig, weights: LayerWeights, h, k_cache, v_cache, lengths, num_new, pool, slots):
    """A whole layer whose experts are known to be in their slots: the resident flow and the self-draft.

    -> h, the experts that the router chose [n, A] (not those that stood in), caches.
    """
    h, x, routing, k_cache, v_cache = attention(config, weights, h, k_cache, v_cache, lengths, num_new)
    return resident_experts(config, weights, h, x, routing, pool, slots), routing.ids, k_cache, v_cache


@functools.partial(jax.jit, static_argnums=0)
def resident_experts(config: ModelConfig, weights: LayerWeights, h, x, routing: Routing, pool, slots: DraftSlots | jax.Array):
    """The experts of a layer by what is in the pool: slots [E], or how a draft substitutes. -> h [B, T, M]."""
    if isinstance(slots, MaskedSlots):
        routing, slots = layers.reroute(config, weights, x, routing, slots.own >= 0), slots.own
    if isinstance(slots, DistinctSlots):
        with jax.named_scope("experts"):
            return layers.combine(h, ops.expert_ffn(x, pool, choose_distinct(routing.ids, slots)), routing)
    return experts(h, x, routing, pool, slots)


def choose_slots(ids: jax.Array, slots: jax.Array) -> jax.Array:
    """Slots [n, A] of the chosen experts ids [n, A]; -1 stays -1 (padding), as does an expert without a slot."""
    return jnp.where(ids < 0, -1, slots[ids])
