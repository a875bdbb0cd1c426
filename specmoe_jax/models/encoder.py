"""The encoder of an encoder-decoder: the decoder's layers without a cache, attending in both directions."""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.attention import scores_and_values, within
from specmoe_jax.models.basics import norm
from specmoe_jax.models.spec import LayerWeights, Weights
from specmoe_jax.types import CrossCache, Routing


def attention(
    config: LayerConfig, weights: LayerWeights[jax.Array], h: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, Routing | None]:
    """A layer but for its routed experts. h [B, S, M], of which row b has lengths[b] positions; the others route nowhere.

    -> h, the experts' input x [n, M] and its routing, None without experts.
    """
    length = h.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), h.shape[:2])
    q, k, v = layers.pre_attention(config, weights, h, positions)
    seen = within(lengths, length, length)
    attended = scores_and_values(config.attention, q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, None)
    return layers.post_attention(config, weights, h, attended, positions < lengths[:, None])


@functools.partial(jax.jit, static_argnums=0)
def cross_caches(config: ModelConfig, weights: Weights[jax.Array], h: jax.Array, lengths: jax.Array) -> tuple[CrossCache, ...]:
    """What each decoder layer attends, from h [B, S, M] after the last encoder layer."""
    assert weights.encoder is not None
    encoded = norm(h, weights.encoder.final_norm, weights.encoder.final_norm_bias, config.norm_eps)
    pairs = zip(config.layers, weights.layers, strict=True)
    return tuple(layers.cross_cache(layer, layer_weights, encoded, lengths) for layer, layer_weights in pairs)
