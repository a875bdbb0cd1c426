"""Programs of many layers, for passes that find every expert in its slot and so need no word from the host between two layers."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine import stages
from specmoe_jax.engine.rows import WHOLE, Split, constrained
from specmoe_jax.models import layers
from specmoe_jax.models.spec import LayerWeights, Weights
from specmoe_jax.speculate.drafts.protocol import TokenChoice
from specmoe_jax.speculate.drafts.self_draft import choose_token
from specmoe_jax.support.processes import in_order
from specmoe_jax.types import CrossCache, Tree

LAYERS_PER_PROGRAM = (
    16  # of a pass: layers that are alike share programs, and 48 in one took 4 times as long to compile, no less to run
)

Caches = tuple[jax.Array, ...]  # of keys or of values, one [B, K, S, D] a layer


def _resident_layers(
    configs: Sequence[LayerConfig],
    weights: Sequence[LayerWeights[jax.Array]],
    h: jax.Array,
    k: Caches,
    v: Caches,
    lengths,
    num_new,
    pool,
    slots,
    cross: Sequence[CrossCache] | None,
    tree: Tree | None = None,
    split: Split = None,
):
    """slots: of the layers that have experts, in turn. -> h after each layer, what their routers decided in turn, caches."""
    states, routed, keys, values, of_layer = [], [], [], [], iter(slots)
    for i, config in enumerate(configs):
        own = None if config.router is None else next(of_layer)
        h, routing, key, value = stages.layer(
            config, weights[i], h, k[i], v[i], lengths, num_new, pool, own, cross and cross[i], tree, split=split
        )
        states.append(h)
        routed += [] if routing is None else [routing]
        keys.append(key)
        values.append(value)
    return states, routed, tuple(keys), tuple(values)


@in_order
@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6), static_argnames="split")
def run_layers(
    configs: tuple[LayerConfig, ...],
    watched: tuple[int, ...],
    tells_routing: bool,
    weights,
    h,
    k: Caches,
    v: Caches,
    lengths,
    num_new,
    pool,
    slots,
    cross,
    tree,
    *,
    split: Split = None,
):
    """As `stages.layer`, for consecutive layers; slots: [L, E].

    -> h, the inputs of the watched ones, caches, what the routers decided in turn (nothing unless `tells_routing`).
    """
    states, routed, k, v = _resident_layers(configs, weights, h, k, v, lengths, num_new, pool, slots, cross, tree, split)
    return states[-1], [([h, *states])[layer] for layer in watched], k, v, tuple(routed) if tells_routing else ()


def _forward(config: ModelConfig, weights: Weights[jax.Array], k, v, cross, pool, slots, tokens, lengths, num_new, split: Split):
    h = layers.embed(weights, tokens[:, None], lengths[:, None], config.embedding)
    given = (h, k, v, lengths, num_new, pool, slots, cross)
    states, routed, k, v = _resident_layers(config.layers, weights.layers, *given, split=split)
    logits = stages.logits_of_rows(config.head, weights, states[-1], split)
    return logits[:, 0], jnp.stack([routing.ids for routing in routed]), k, v


@in_order
@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3), static_argnames="split")
def draft_forward(
    config: ModelConfig,
    weights: Weights[jax.Array],
    k: Caches,
    v: Caches,
    cross,
    pool,
    slots,
    tokens,
    lengths,
    num_new,
    *,
    split: Split = None,
):
    """One token per row [B]. slots: of each layer with experts, DraftSlots. -> logits [B, V], choices [L, B, A], caches."""
    with jax.named_scope("draft"):
        logits, choices, k, v = _forward(config, weights, k, v, cross, pool, slots, tokens, lengths, num_new, split)
        return *constrained((logits, choices), split, WHOLE), k, v


# With the pass XLA would convert all weights in half precision before the loop, and keep a float32 copy of each (on a CPU).
@in_order
@functools.partial(
    jax.jit,
    static_argnums=(0, 1, 2),
    donate_argnums=(4, 5),
    static_argnames="split",
    compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
)
def draft_chain(
    config: ModelConfig,
    most: int,
    tells_choices: bool,
    weights: Weights[jax.Array],
    k: Caches,
    v: Caches,
    cross,
    pool,
    slots,
    token,
    lengths,
    num_new,
    choice: TokenChoice,
    count,
    *,
    split: Split = None,
):
    """`count` tokens per row, at most `most`, each fed back: one program for all lengths.

    -> tokens [B, most], their distributions [B, most, V] where they were drawn, caches, and with `tells_choices` what the routers
    chose for each token that was fed [most, L, B, A] (-1 beyond `count`).
    """
    drawn = choice.keys is not None and choice.coupled is None
    tokens = jnp.zeros((len(token), most), jnp.int32)
    probs = jnp.zeros((*tokens.shape, config.vocab_size), jnp.float32) if drawn else None

    shape = (most, config.num_moe_layers, len(token), config.experts_per_token)
    choices = jnp.full(shape, -1, jnp.int32) if tells_choices else None

    def one(position, carry):
        token, tokens, probs, choices, k, v = carry
        logits, chosen, k, v = _forward(config, weights, k, v, cross, pool, slots, token, lengths + position, num_new, split)
        token, q = choose_token(choice, position, logits, tokens)
        probs = None if q is None else probs.at[:, position].set(q)
        choices = None if choices is None else choices.at[position].set(chosen)
        return token, tokens.at[:, position].set(token), probs, choices, k, v

    with jax.named_scope("draft"):
        begin = (jnp.asarray(token), tokens, probs, choices, k, v)
        _, tokens, probs, choices, k, v = jax.lax.fori_loop(0, count, one, begin)
    tokens, probs, choices = constrained((tokens, probs, choices), split, WHOLE)
    return tokens, probs, k, v, choices


def groups(num_layers: int) -> list[slice]:
    """Consecutive layers, LAYERS_PER_PROGRAM at most."""
    return [slice(start, start + LAYERS_PER_PROGRAM) for start in range(0, num_layers, LAYERS_PER_PROGRAM)]
