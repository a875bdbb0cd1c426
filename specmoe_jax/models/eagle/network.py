"""EAGLE draft heads: one dense layer that predicts the target's next hidden state from the last one and a token.

EAGLE-1 and -2 (Li et al. 2024a, b) share a network: fc over [embedding(token_{i+1}), feature_i], a Llama layer without
input norm, the target's output matrix. Its feature is the target's last hidden state after the final norm. EAGLE-3 (Li et
al. 2025) takes the residual streams before three layers of the target, and has norms, an output matrix and a
vocabulary of its own. Row i of a head, at position i, holds feature_i and the token after it and gives feature_{i+1}.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from specmoe_jax.models import layers
from specmoe_jax.models.attention import attend, attend_rows, behind
from specmoe_jax.models.basics import affine, rms_norm
from specmoe_jax.models.eagle.config import EagleConfig, EagleWeights, weight_specs
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import map_specs, random_tensor
from specmoe_jax.ops import PackedMatrix
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import Grown, KVCache


@struct.dataclass
class EagleHead:
    """A loaded head with what it borrows from the target: embed and output, both [V, M]."""

    config: EagleConfig = struct.field(pytree_node=False)
    weights: EagleWeights[jax.Array]
    embed: jax.Array
    output: jax.Array | PackedMatrix


def fuse(head: EagleHead, features: jax.Array) -> jax.Array:
    """What a head makes of the target's features [..., M']: themselves, or EAGLE-3's mixture of three -> [..., M]."""
    config, weights = head.config, head.weights
    if not config.fused:
        return features
    if config.norm_before_fc:
        assert weights.fc_norm is not None
        features = rms_norm(features, weights.fc_norm, config.layer.norm_eps)
    return affine(features, weights.fc, weights.fc_bias)


def layer_input(head: EagleHead, tokens: jax.Array, feature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Residual stream [B, T, M] and the input of the projections [B, T, M or 2M] of tokens [B, T] beside feature [B, T, M]."""
    config, weights, embedded = head.config, head.weights, head.embed[tokens].astype(feature.dtype)
    if not config.fused:
        h = affine(jnp.concatenate([embedded, feature], axis=-1), weights.fc, weights.fc_bias)
        return h, h
    eps = config.layer.norm_eps
    assert weights.layer.input_norm is not None and weights.hidden_norm is not None
    normed = rms_norm(feature, weights.hidden_norm, eps)
    x = jnp.concatenate([rms_norm(embedded, weights.layer.input_norm, eps), normed], axis=-1)
    return normed if config.norm_before_residual else feature, x


class Projected(NamedTuple):
    """A pass of the layer as far as its attention. h: [B, T, M]. q: [B, T', H, D]; k, v: [B, T', K, D], T' = T but in a tree."""

    h: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array


def project(head: EagleHead, tokens: jax.Array, feature: jax.Array, lengths: jax.Array) -> Projected:
    """Tokens [B, T] at positions lengths[b] + t, each following feature [B, T, M] (fused, see `fuse`)."""
    h, x = layer_input(head, tokens, feature)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return Projected(h, *layers.queries_keys_values(head.config.layer, head.weights.layer, x, positions))


def project_tree(head: EagleHead, tokens: jax.Array, feature: jax.Array, grown: Grown, lengths: jax.Array) -> Projected:
    """One generation of a tree in every row: tokens [B, k], each with the feature [B, k, M] of its parent's row.

    grown: the generations before it, whose keys stand again at lengths[b] on; tree: of all nodes, this generation last. What
    comes back holds all of them, with queries of zeros for the earlier ones, which need no output again.
    """
    width = tokens.shape[1]
    h, x = layer_input(head, tokens, feature)
    positions = lengths[:, None] + grown.tree.depths[:, -width:]
    return Projected(h, *behind(grown, *layers.queries_keys_values(head.config.layer, head.weights.layer, x, positions)))


def finish(head: EagleHead, h: jax.Array, attended: jax.Array) -> jax.Array:
    """The layer after its attention: h [B, T, M], of attended [B, T', H, D] the last T -> predicted features [B, T, M]."""
    new = h.shape[1]
    config, weights = head.config, head.weights
    out = layers.post_attention(config.layer, weights.layer, h, attended[:, -new:], jnp.ones(h.shape[:2], bool))[0]
    if not config.norm_output:
        return out
    assert weights.norm is not None
    return rms_norm(out, weights.norm, config.layer.norm_eps)


def forward(
    head: EagleHead, tokens: jax.Array, feature: jax.Array, kv: KVCache, rows: jax.Array, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, KVCache]:
    """One pass of the layer over T further rows of some sequences.

    tokens [b, T], each following feature [b, T, M] (fused, see `fuse`); kv: one layer of B rows of cache; rows [b] int32:
    where these sequences' cache is, 0..B-1 and different, any other number is padding; lengths, num_new [b]: positions
    that their caches hold, and new ones. -> predicted features [b, T, M] and the cache with their keys and values.
    """
    h, q, k, v = project(head, tokens, feature, lengths)
    attended, kv = attend_rows(head.config.layer.attention, q, k, v, kv, rows, lengths, num_new)
    return finish(head, h, attended), kv


def forward_tree(
    head: EagleHead, tokens: jax.Array, feature: jax.Array, grown: Grown, kv: KVCache, lengths: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, Grown, KVCache]:
    """`project_tree`, attention and `finish`. -> predicted features [B, k, M], grown with this generation, and the cache."""
    h, q, k, v = project_tree(head, tokens, feature, grown, lengths)
    count = num_new * k.shape[1]
    attended, k_cache, v_cache = attend(head.config.layer.attention, q, k, v, None, kv.k[0], kv.v[0], lengths, count, grown.tree)
    return finish(head, h, attended), Grown(k=k, v=v, tree=grown.tree), KVCache(k=(k_cache,), v=(v_cache,))


def logits(head: EagleHead, feature: jax.Array) -> jax.Array:
    """[..., M] -> [..., V] float32; -inf for what is not in an EAGLE-3 head's own vocabulary."""
    weights = head.weights
    if weights.lm_head is None:
        return layers.output(head.output, feature)
    assert weights.norm is not None  # an EAGLE-3 head
    normed = feature if head.config.norm_output else rms_norm(feature, weights.norm, head.config.layer.norm_eps)
    own = layers.output(weights.lm_head, normed)
    return jnp.full((*own.shape[:-1], len(head.embed)), -jnp.inf).at[..., weights.to_target].set(own)


def check_head(model: Model, head: EagleHead) -> EagleHead:
    """The head itself. Raises PlanError when it borrows its embedding from another model, or computes in another dtype."""
    if head.embed is not model.weights.embed:
        raise PlanError("the draft head was loaded for another model; load it with this one: checkpoints.load_head(DIR, model)")
    return head


def head_bytes(head: EagleHead, *, batch_rows: int, positions: int) -> int:
    """Accelerator bytes of the head's own weights, its cache and its feature row; what it borrows is the target's."""
    rows = positions * position_bytes(head) + head.config.hidden_size * head.weights.fc.dtype.itemsize
    return sum(leaf.nbytes for leaf in jax.tree.leaves(head.weights)) + batch_rows * rows


def position_bytes(head: EagleHead) -> int:
    """Of its cache, of one position of one row."""
    attention = head.config.layer.attention
    return 2 * attention.num_kv_heads * attention.cache_dim * head.weights.fc.dtype.itemsize


def random_head(config: EagleConfig, model: Model, *, seed: int = 0) -> EagleHead:
    """A head of random weights for a model, for tests. EAGLE-3's vocabulary: every other token of the target's."""
    weights = map_specs(lambda spec: jnp.asarray(random_tensor(spec, seed), model.dtype), weight_specs(config))
    if config.fused:
        weights = dataclasses.replace(weights, to_target=2 * jnp.arange(config.draft_vocab_size, dtype=jnp.int32))
    return attach(config, weights, model)


def attach(config: EagleConfig, weights: EagleWeights[jax.Array], model: Model) -> EagleHead:
    """The head of a model, which lends it embedding and output matrix."""
    return EagleHead(config=config, weights=weights, embed=model.weights.embed, output=layers.output_matrix(model.weights))
