"""The lightning indexer (DeepSeek-AI 2025, DeepSeek-V3.2, 2.1): which positions of its context a query attends.

Every position has an index key. A query scores all that it may see by sum_h w_h relu(q_h . k), and attends the best
`Indexer.kept` of them. Scales that multiply all scores of a query alike are left out: they change no choice.
An index key lies in the value cache, behind the latent, in numbers that attention to a latent leaves unused: so it is
appended, paged, moved, rolled back and counted with its position, wherever the cache is. What a query asks for, its index heads
and their weights, travels behind the query in its last axis, cut into as many parts as there are heads.
Deviation: the published kernels score in FP8 after a Hadamard rotation; here, as in transformers, in the cache's dtype.
"""

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import AttentionConfig, Indexer
from specmoe_jax.models.basics import heads, linear, norm, rope
from specmoe_jax.models.selection import handed
from specmoe_jax.models.spec import IndexerWeights
from specmoe_jax.ops.products import einsum

NORM_EPS = 1e-6  # of the keys' norm (transformers' constant)
BLOCK = 512  # keys that all index heads of all queries are scored against at once


def own_indexer(config: AttentionConfig) -> Indexer:
    """Of attention that has one."""
    assert config.indexer is not None
    return config.indexer


def selects(config: AttentionConfig, positions: int) -> bool:
    """Whether a cache of so many positions may hold more than a query attends."""
    return config.kept is not None and positions > config.kept


def project(
    config: AttentionConfig, weights: IndexerWeights[jax.Array], x: jax.Array, query_input: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x [B, T, M], normed, and what queries are made from [B, T, rank] -> asked [B, T, H, asked_dim], keys [B, T, 1, index dim]."""
    indexer = own_indexer(config)
    k = norm(linear(x, weights.k), weights.k_norm, weights.k_norm_bias, NORM_EPS)[:, :, None]
    q, k = rope((heads(linear(query_input, weights.q), indexer.heads), k), positions, indexer.rope)
    asked = jnp.concatenate([q, linear(x, weights.heads)[..., None]], axis=-1).reshape(*x.shape[:2], -1)
    return handed.by_heads(config, asked), k


def asked_of(config: AttentionConfig, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Queries [B, T, H, D], and what they ask an indexer for [B, T, heads, index dim + 1], where there is one.

    Where an earlier layer's choice is taken, that [B, T, taken_numbers].
    """
    if config.kept is None:
        return q, None
    asked = q[..., config.head_dim :].reshape(*q.shape[:2], -1)
    if config.indexer is None:
        return q[..., : config.head_dim], asked[..., : config.taken_numbers]
    return q[..., : config.head_dim], heads(asked[..., : config.indexer.asked], config.indexer.heads)


def keys_of(config: AttentionConfig, values: jax.Array) -> jax.Array:
    """Index keys of rows of the value cache [..., cache_dim]."""
    assert config.latent is not None
    return values[..., config.latent.rank : config.latent.rank + own_indexer(config).dim]


def chosen(config: AttentionConfig, asked: jax.Array, values: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best positions of those seen [B, T, S] bool, and which of them there are: [B, T, kept] int32 and bool.

    asked: see `asked_of`; values [B, S, cache_dim], of the cache. Of equal scores the earlier position is chosen, whatever pass
    asks. Where an earlier layer's choice is taken, that.
    """
    if config.indexer is None:
        return handed.read(asked)
    keys = keys_of(config, values)
    scores = jnp.where(seen, _scores(asked, keys), -jnp.inf)
    best, places = jax.lax.top_k(scores, min(own_indexer(config).kept, keys.shape[1]))
    return places, best > -jnp.inf


def mask(places: jax.Array, there: jax.Array, count: int) -> jax.Array:
    """`chosen` of so many positions as [B, T, count] bool."""
    rows = jnp.arange(places.shape[0])[:, None, None], jnp.arange(places.shape[1])[:, None]
    return jnp.zeros((*places.shape[:2], count), bool).at[(*rows, places)].max(there)


def _scores(asked: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, T, S] float32. In blocks of keys: those of all index heads at once would be many times the cache."""
    q, weight = asked[..., :-1], asked[..., -1].astype(jnp.float32)

    def block(own: jax.Array) -> jax.Array:
        return jnp.einsum("bth,bths->bts", weight, jax.nn.relu(einsum("bthd,bsd->bths", q, own)), precision="highest")

    batch, count, dim = keys.shape
    if count <= BLOCK:
        return block(keys)
    blocks = -(-count // BLOCK)
    padded = jnp.pad(keys, ((0, 0), (0, blocks * BLOCK - count), (0, 0))).reshape(batch, blocks, BLOCK, dim)
    found = jax.lax.map(block, padded.swapaxes(0, 1))  # [blocks, B, T, BLOCK]
    return jnp.moveaxis(found, 0, 2).reshape(*asked.shape[:2], -1)[..., :count]
