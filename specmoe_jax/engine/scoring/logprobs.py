"""Log-probabilities from hidden states or logits, a bounded number of positions at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import Head
from specmoe_jax.models import layers
from specmoe_jax.models.spec import Weights

LOGITS_AT_ONCE = 1 << 24  # numbers (64 MiB) of one call: 8,000 positions of a vocabulary of 150,000 would take 5 GB at once
MOST_POSITIONS = 512  # of one call: as many as a micro-batch of prompts


class LogProbs(NamedTuple):
    """of: [n, C], log-probabilities of the tokens asked for. best: [n] int32, the argmax. top_ids, top: [n, k], the k best."""

    of: jax.Array
    best: jax.Array
    top_ids: jax.Array
    top: jax.Array


def positions_at_once(vocab_size: int) -> int:
    """n of one call of `score_states`, a power of two."""
    return min(MOST_POSITIONS, 1 << max((LOGITS_AT_ONCE // vocab_size).bit_length() - 1, 0))


def log_probs(logits: jax.Array, tokens: jax.Array, top: int) -> LogProbs:
    """Of logits [n, V] float32. tokens: [n, C] int32. top: k, at most V."""
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, ids = jax.lax.top_k(logits, top)
    return LogProbs(
        of=jnp.take_along_axis(logits, tokens, axis=-1) - norm,
        best=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        top_ids=ids.astype(jnp.int32),
        top=values - norm,
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def score_states(
    config: Head, weights: Weights[jax.Array], h: jax.Array, index: jax.Array, tokens: jax.Array, top: int
) -> LogProbs:
    """Of some positions of a pass. h: [b, T, M] after the last layer; index: [n] into its positions; tokens: [n, C]."""
    with jax.named_scope("score"):
        chosen = h.reshape(-1, h.shape[-1])[index]
        return log_probs(layers.head(config, weights, chosen[None])[0], tokens, top)
