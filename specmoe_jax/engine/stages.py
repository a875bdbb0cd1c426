"""The compiled pieces of a pass. One program per stage, shape and kind of layer (LayerConfig).

Per-layer programs over per-layer buffers compile once whatever the depth, and the host can act between them;
a scan over stacked weights copies each layer's slice (3x slower on CPU).
"""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import Head, LayerConfig, Recurrence
from specmoe_jax.engine.rows import OWN, WHOLE, Split, constrained, of_all, over_rows, split_like
from specmoe_jax.models import attention as attentions
from specmoe_jax.models import encoder, layers, prefill_attention, recurrent
from specmoe_jax.models import experts as ffn
from specmoe_jax.models.spec import LayerWeights, RecurrentWeights, Weights
from specmoe_jax.ops import PackedCache
from specmoe_jax.speculate.hot_experts.substitution import DistinctSlots, MaskedSlots, ReducedSlots, best_choices, choose_distinct
from specmoe_jax.support.processes import in_order
from specmoe_jax.types import CrossCache, RecurrentState, Routing, Tree

final_norm = functools.partial(jax.jit, static_argnums=0)(layers.final_norm)


@functools.partial(jax.jit, static_argnums=0, static_argnames="split")
def embed(config, weights: Weights[jax.Array], token_ids, lengths, tree: Tree | None = None, *, split: Split = None):
    """See layers.embed; positions as of `pre_attention`."""
    positions = layers.positions_of(lengths, token_ids.shape[1], tree)
    return constrained(layers.embed(weights, token_ids, positions, config), split, OWN)


@split_like(2)
@in_order
@functools.partial(jax.jit, static_argnums=0, static_argnames="split")
def head(config: Head, weights: Weights[jax.Array], h: jax.Array, *, split: Split = None) -> jax.Array:
    """Logits [B, T, V] float32 of all rows, each device of its own h [B, T, M] first."""
    return logits_of_rows(config, weights, h, split)


def logits_of_rows(config: Head, weights: Weights[jax.Array], h: jax.Array, split: Split) -> jax.Array:
    """`head` within a program."""
    if split is None:
        return layers.head(config, weights, h)
    return over_rows(split, lambda weights, h: of_all(layers.head(config, weights, h)), (weights,), (h,), WHOLE)


@functools.partial(jax.jit, static_argnums=0)
def pre_attention(
    config: LayerConfig, weights: LayerWeights[jax.Array], h: jax.Array, lengths: jax.Array, tree: Tree | None = None
):
    """h [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D], rotated to positions lengths[b] + t, or + depth in a tree."""
    with jax.named_scope("pre_attention"):
        return layers.pre_attention(config, weights, h, layers.positions_of(lengths, h.shape[1], tree))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def attend(config: LayerConfig, q, k, v, sinks, k_cache, v_cache, lengths, num_new, tree: Tree | None = None):
    """Appends k, v to the caches [B, K, S, D] (donated) and attends. -> attended [B, T, H, D], caches."""
    with jax.named_scope("attend"):
        return attentions.attend(config.attention, q, k, v, sinks, k_cache, v_cache, lengths, num_new, tree)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def recur(
    config: LayerConfig,
    weights: RecurrentWeights[jax.Array],
    channels,
    z,
    rates,
    cache: RecurrentState,
    lengths,
    num_new,
    tree: Tree | None = None,
):
    """In a recurrent layer what `attend` is in others; channels, z, rates: of `pre_attention`. -> outputs, cache (donated)."""
    with jax.named_scope("recur"):
        return recurrent.recur(own_recurrence(config), weights, channels, z, rates, cache, lengths, num_new, tree)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def recur_rows(config: LayerConfig, weights, channels, z, rates, cache: RecurrentState, rows, lengths, num_new, tree=None):
    """`recur` of the sequences whose states are rows [b] int32 of the cache (donated), -1 for padding."""
    with jax.named_scope("recur_rows"):
        recurrence = own_recurrence(config)
        return recurrent.recur_rows(recurrence, weights, channels, z, rates, cache, rows, lengths, num_new, tree)


def own_recurrence(config: LayerConfig) -> Recurrence:
    """Of a recurrent layer."""
    assert config.attention.recurrent is not None
    return config.attention.recurrent


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def attend_paged(config: LayerConfig, q, k, v, sinks, cache: PackedCache, table, lengths, num_new, tree: Tree | None = None):
    """As `attend`, over a paged cache in host memory (donated). table [B, P] int32 -> attended [B, T, H, D], cache."""
    with jax.named_scope("attend_paged"):
        return attentions.attend_paged(config.attention, q, k, v, sinks, cache, table, lengths, num_new, tree)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def append_paged(config: LayerConfig, k, v, cache: PackedCache, table, lengths, num_new):
    """The first half of `attend_paged`, for keys and values that were attended elsewhere. -> cache."""
    with jax.named_scope("append_paged"):
        return attentions.append_paged(config.attention, k, v, cache, table, lengths, num_new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def attend_chunk(config: LayerConfig, q, k, v, sinks, k_rows, v_rows, lengths, num_new):
    """A chunk of prompts over staged rows [B, K, S, D] on the accelerator (donated). -> attended [B, T, H, D], rows."""
    with jax.named_scope("attend_chunk"):
        return prefill_attention.attend_chunk(config.attention, q, k, v, sinks, k_rows, v_rows, lengths, num_new)


@functools.partial(jax.jit, static_argnums=0)
def post_attention(config: LayerConfig, weights: LayerWeights[jax.Array], h, attended, num_new, cross: CrossCache | None = None):
    """-> h [B, T, M], the experts' input x [n, M] and its Routing (None without experts); rows t >= num_new[b] route nowhere."""
    with jax.named_scope("post_attention"):
        valid = jnp.arange(h.shape[1], dtype=jnp.int32) < num_new[:, None]
        return layers.post_attention(config, weights, h, attended, valid, cross)


@in_order
@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4), static_argnames="split")
def attention(
    config: LayerConfig,
    weights: LayerWeights[jax.Array],
    h,
    k_cache,
    v_cache,
    lengths,
    num_new,
    cross: CrossCache | None = None,
    tree: Tree | None = None,
    *,
    split: Split = None,
):
    """The three stages above as one program, for a cache on the accelerator (donated).

    What goes to the experts and what the router decided are of all rows on every device.
    """
    own = (h, k_cache, v_cache, lengths, num_new, cross, tree)
    if split is None:
        return _attention(config, weights, *own)

    def of_device(*given):
        h, x, routing, k_cache, v_cache = _attention(config, *given)
        return h, *of_all((x, routing)), k_cache, v_cache

    return over_rows(split, of_device, (weights,), own, (OWN, WHOLE, WHOLE, OWN, OWN))


def _attention(config: LayerConfig, weights: LayerWeights[jax.Array], h, k_cache, v_cache, lengths, num_new, cross, tree):
    q, k, v = pre_attention(config, weights, h, lengths, tree)
    if config.attention.recurrent is not None:
        attended, k_cache = recur(config, weights.recurrent, q, k, v, k_cache, lengths, num_new, tree)
    else:
        attended, k_cache, v_cache = attend(config, q, k, v, weights.sinks, k_cache, v_cache, lengths, num_new, tree)
    return *post_attention(config, weights, h, attended, num_new, cross), k_cache, v_cache


@functools.partial(jax.jit, static_argnums=0)
def encoder_attention(config: LayerConfig, weights: LayerWeights[jax.Array], h: jax.Array, lengths: jax.Array):
    """An encoder layer but for its experts, whole sequences at once. -> as post_attention."""
    with jax.named_scope("encoder_attention"):
        return encoder.attention(config, weights, h, lengths)


@in_order
@functools.partial(jax.jit, static_argnums=0, static_argnames="split")
def experts(
    config: LayerConfig, h: jax.Array, x, routing: Routing | None, pool: jax.Array, slots, elsewhere=None, *, split: Split = None
) -> jax.Array:
    """All chosen experts at once. h [B, T, M]; pool [R, 3, F, M]; slots [E] -> h [B, T, M], as it was if routing is None.

    elsewhere: outputs [n, A, M] of those that have no slot, zeros for all others.
    """
    if routing is None:
        return h
    return _chosen_experts(config, h, x, routing, pool, choose_slots(routing.ids, slots), split, elsewhere)


def _chosen_experts(config: LayerConfig, h: jax.Array, x, routing: Routing, pool, slots, split: Split, elsewhere=None) -> jax.Array:
    """slots: [n, A]."""
    with jax.named_scope("experts"):
        outputs = ffn.expert_ffn(config.own_experts, x, pool, slots, divided=split is not None)
        outputs = outputs if elsewhere is None else elsewhere + outputs  # one of the two is zero
        return constrained(layers.combine(h, outputs, routing), split, OWN)


@in_order
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(9, 10), static_argnames="split")
def experts_and_attention(
    before: LayerConfig,
    config: LayerConfig,
    h: jax.Array,
    x,
    routing: Routing,
    pool: jax.Array,
    slots,
    elsewhere: jax.Array | None,
    weights: LayerWeights[jax.Array],
    k_cache,
    v_cache,
    lengths,
    num_new,
    cross: CrossCache | None = None,
    tree: Tree | None = None,
    *,
    split: Split = None,
):
    """The experts of one layer and the attention of the next: what the host has no word in. -> h between the two, as attention."""
    h = experts(before, h, x, routing, pool, slots, elsewhere, split=split)
    return h, *attention(config, weights, h, k_cache, v_cache, lengths, num_new, cross, tree, split=split)


@split_like(1)
@in_order
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1, static_argnames="split")
def experts_wave(
    config: LayerConfig, outputs: jax.Array, x, ids: jax.Array, pool: jax.Array, slots, *, split: Split = None
) -> jax.Array:
    """Adds the experts of one wave to outputs [n, A, M]; every entry gets exactly one non-zero summand."""
    with jax.named_scope("experts_wave"):
        own = ffn.expert_ffn(config.own_experts, x, pool, choose_slots(ids, slots), divided=split is not None)
        return constrained(outputs + own, split, OWN)


@functools.partial(jax.jit, static_argnums=0)
def experts_on_host(config: LayerConfig, x, ids: jax.Array, table: jax.Array, here) -> jax.Array:
    """Outputs [n, A, M] of the experts that the host computes, zeros for all others. All arrays are the CPU's.

    table [E, 2] uint32: addresses of the layer's blocks. here [E] int32: an expert's own number where the host computes it,
    else -1.
    """
    with jax.named_scope("experts_on_host"):
        return ffn.expert_ffn(config.own_experts, x, table, choose_slots(ids, here))


@split_like(0)
@functools.partial(jax.jit, static_argnames="split")
def combine(h: jax.Array, outputs: jax.Array, routing: Routing, *, split: Split = None) -> jax.Array:
    """See layers.combine."""
    return constrained(layers.combine(h, outputs, routing), split, OWN)


@in_order
@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4), static_argnames="split")
def layer(
    config: LayerConfig,
    weights: LayerWeights[jax.Array],
    h,
    k_cache,
    v_cache,
    lengths,
    num_new,
    pool,
    slots,
    cross=None,
    tree=None,
    *,
    split: Split = None,
):
    """A whole layer whose experts are known to be in their slots: the resident flow and the self-draft.

    -> h, what the router decided (not who stood in; None without experts), caches.
    """
    given = (config, weights, h, k_cache, v_cache, lengths, num_new, cross, tree)
    h, x, routing, k_cache, v_cache = attention(*given, split=split)
    return resident_experts(config, weights, h, x, routing, pool, slots, split=split), routing, k_cache, v_cache


@in_order
@functools.partial(jax.jit, static_argnums=0, static_argnames="split")
def resident_experts(
    config: LayerConfig, weights: LayerWeights[jax.Array], h, x, routing: Routing | None, pool, slots, *, split: Split = None
):
    """The experts of a layer by what is in the pool. slots: [E], DraftSlots if a draft substitutes, None without experts.

    -> h [B, T, M].
    """
    reduced = slots if isinstance(slots, ReducedSlots) else None
    slots = slots if reduced is None else reduced.slots
    if isinstance(slots, MaskedSlots):
        assert routing is not None
        routing, slots = layers.reroute(config, weights, x, routing, jnp.asarray(slots.own) >= 0), slots.own
    if reduced is not None:
        assert routing is not None
        routing = best_choices(routing, reduced.own, reduced.top_k)
    if isinstance(slots, DistinctSlots):
        assert routing is not None
        return _chosen_experts(config, h, x, routing, pool, choose_distinct(routing.ids, slots), split)
    return experts(config, h, x, routing, pool, slots, split=split)


def choose_slots(ids: jax.Array, slots: jax.Array) -> jax.Array:
    """Slots [n, A] of the chosen experts ids [n, A]; -1 stays -1 (padding), as does an expert without a slot."""
    return jnp.where(ids < 0, -1, slots[ids])
