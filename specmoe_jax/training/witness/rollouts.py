"""Continuations drawn from the model in training, a token at a time from cached keys and values."""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax.training.witness import model
from specmoe_jax.training.witness.config import WitnessConfig

CAPACITY_FACTOR = 4.0  # as good as every expert for every token; loops load experts unevenly


def _step(params: model.Params, bias: jax.Array, caches, tokens: jax.Array, at: jax.Array, config: WitnessConfig):
    """The row's next logits [B, V] and the caches with position `at` in them. tokens [B]; a cache: (keys, values) [B, S, K, D]."""
    x, written = params.embedding[tokens][:, None], []
    for index, (layer, (keys, values)) in enumerate(zip(params.layers, caches, strict=True)):

        def mix(x, weights, keys=keys, values=values):
            q, k, v = model.project(x, weights, at[None], config)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, at, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
            written.append((keys, values))
            logits = jnp.einsum("bkgd,bskd->bkgs", q[:, 0], keys)
            shares = jax.nn.softmax(jnp.where(jnp.arange(keys.shape[1]) <= at, logits, -jnp.inf), axis=-1)
            return jnp.einsum("bkgs,bskd->bkgd", shares, values).reshape(len(x), 1, -1) @ weights.wo

        x, _ = model.run_layer(x, layer, bias[max(index - 1, 0)], config, CAPACITY_FACTOR, mix)
    return model.rms_norm(x[:, 0], params.norm, config.norm_eps) @ params.head, tuple(written)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def continued(params, bias, tokens, lengths, key, temperatures, *, config: WitnessConfig, count: int) -> jax.Array:
    """Each row's `count` next tokens; at temperature 0 the likeliest. The key is consumed.

    tokens [B, S] int32, room for `count` behind the longest prompt; lengths [B] of the prompts; temperatures [B] -> [B, count].
    """
    batch, size = tokens.shape
    empty = jnp.zeros((batch, size, config.num_kv_heads, config.head_dim))
    rows = jnp.arange(size)

    def one(carry, step):
        tokens, caches = carry
        at, key = step
        logits, caches = _step(params, bias, caches, tokens[:, at], at, config)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperatures, 1e-6)[:, None])
        token = jnp.where(temperatures > 0, drawn, jnp.argmax(logits, axis=-1))
        token = jnp.where(at + 1 < lengths, tokens[:, at + 1], token)  # still inside its prompt
        return (tokens.at[:, at + 1].set(token), caches), None

    steps = (rows[:-1], jax.random.split(key, size - 1))
    (tokens, _), _ = jax.lax.scan(one, (jnp.asarray(tokens), ((empty, empty),) * len(params.layers)), steps)
    return jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(count), axis=1)
