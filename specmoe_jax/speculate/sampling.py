"""From logits to the distribution really sampled from, to tokens, with randomness that belongs to the row alone."""

import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.types import SamplingRows


class Stream(enum.IntEnum):
    """Independent uses of randomness at one position.

    A drafted token and the draw that accepts it must be independent, or acceptance is biased. COUPLED is the noise
    that draft and target share on purpose (`choose_coupled`).
    """

    VERIFY = 0
    DRAFT = 1
    COUPLED = 2


def sampling_rows(params: Sequence[SamplingParams]) -> SamplingRows:
    """The sampling parameters of B requests as arrays [B], within what float32 divides by: a top_p of 0 would leave no token."""
    float32 = np.finfo(np.float32)
    return SamplingRows(
        temperature=np.minimum([p.temperature for p in params], 1 / float32.tiny).astype(np.float32),
        top_k=np.asarray([p.top_k for p in params], np.int32),
        top_p=np.maximum([p.top_p for p in params], float32.tiny).astype(np.float32),
        min_p=np.asarray([p.min_p for p in params], np.float32),
    )


def row_keys(seeds, request_ids, positions, *, stream: Stream = Stream.VERIFY) -> jax.Array:
    """One key a row, a function of (seed, request id, committed position, stream) and of nothing else.

    seeds, request_ids, positions: [B] integers, taken modulo 2**32. -> [B] keys. The generator is named, since the
    draws of a row must not depend on its neighbours under vmap, which jax's rbg does not promise.
    """

    def one(seed, request_id, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
        return jax.random.fold_in(jax.random.fold_in(key, request_id), position)

    return jax.vmap(one)(*(jnp.asarray(x).astype(jnp.uint32) for x in (seeds, request_ids, positions)))


def transform_logits(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Temperature, then top-k, then top-p, then min-p (the order of Hugging Face's warpers), renormalised.

    top_k keeps every token at least as likely as the k-th, so ties with it stay, as in Hugging Face. top_p keeps
    the smallest set whose mass, after top-k, reaches top_p: at least one token, ties to the smaller id. min_p drops what is less
    than min_p times as likely as the best.
    Temperature 0 is the one-hot of the argmax, ties to the smaller id.

    logits: [B, ..., V]; rows: arrays [B] -> probabilities [B, ..., V] float32. A masked token may be -inf; a
    position with a NaN gives NaNs (see `acceptance.finite_positions`).
    """
    temperature, top_k, top_p, min_p = (_beside(x, logits.ndim) for x in rows)
    logits = logits.astype(jnp.float32)
    scores = _scale(logits, temperature)
    limited = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))  # twice the work, and often not needed
    scores = jax.lax.cond(limited, _truncate, lambda scores, *_: scores, scores, top_k, top_p, min_p)
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(temperature == 0, best, jax.nn.softmax(scores, axis=-1))


def sample(keys: jax.Array, probs: jax.Array) -> jax.Array:
    """Draws one token a distribution; tokens of probability 0 are never drawn. The keys are consumed.

    keys: one key, or [B] keys; probs: [B, ..., V], need not sum to 1 -> ids [B, ...] int32.
    """
    draw = jax.random.categorical if keys.ndim == 0 else jax.vmap(jax.random.categorical)
    return draw(keys, jnp.log(probs)).astype(jnp.int32)


def choose_coupled(keys: jax.Array, logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """The token that a position's own noise picks: the argmax of log-probability plus Gumbel noise (Gumbel-max).

    With keys of (seed, request, position) alone, the target's token is a function of its logits, whatever the draft
    and however the work is divided into steps; and a draft with the same noise and similar logits picks the same token
    most of the time, so acceptance is equality (Kool et al. 2019 for the trick; ours for its use here).

    keys: [B, T]; logits: [B, T, V]; rows: arrays [B] -> ids [B, T] int32. The keys are consumed.
    """
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
    scores = jnp.log(transform_logits(logits, rows))  # -inf where temperature, top-k and top-p leave nothing
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)


def coupled_keys(seeds, request_ids, positions) -> jax.Array:
    """Keys [B, T] of positions [B, T]; seeds, request_ids: [B]. See `choose_coupled`."""
    one_column = functools.partial(row_keys, seeds, request_ids, stream=Stream.COUPLED)
    return jax.vmap(one_column, in_axes=1, out_axes=1)(positions)


def _beside(x, ndim: int) -> jax.Array:
    """[B] -> [B, 1, ..., 1] of `ndim` dimensions."""
    x = jnp.asarray(x)
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _scale(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits over temperature, the largest moved to 0 first so that no temperature above 0 overflows."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    safe = jnp.where(temperature == 0, 1.0, jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny))
    return shifted / safe


def _truncate(scores: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Scores with -inf for what top-k, top-p and min-p leave out, the largest being 0. Exactly the identity for 0, 1 and 0."""
    gap = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)  # ordered as the floats are, none being negative
    kth = _last_gap(gap, jnp.ones_like(gap), jnp.where(top_k > 0, top_k, scores.shape[-1]))
    in_top_k = gap <= kth
    probs = jax.nn.softmax(jnp.where(in_top_k, scores, -jnp.inf), axis=-1)
    last = _last_gap(gap, probs, top_p)
    mass_before = jnp.sum(jnp.where(gap < last, probs, 0.0), axis=-1, keepdims=True)
    level = (gap == last) & in_top_k
    twins_before = jnp.cumsum(level, axis=-1, dtype=jnp.float32) - 1.0
    kept = (gap < last) | (level & (mass_before + twins_before * probs < top_p)) | (top_p >= 1)
    return jnp.where(in_top_k & kept & (scores >= jnp.log(min_p)), scores, -jnp.inf)


def _last_gap(gap: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """The gap of the token with which `goal` is reached when tokens are taken by growing gap, or a larger number if never.

    That is the largest g for which the weights of all gaps below g stay under the goal, found bit by bit: 31 passes
    over the row. Sorting is simpler, but 80 rows of 32,000 took XLA 430 ms on two CPU cores, this 6 ms.

    gap: [..., V] int32, not negative; weights: [..., V]; goal: [..., 1], above 0 -> [..., 1] int32.
    """

    def add_bit(i, last):
        larger = last | jnp.left_shift(jnp.int32(1), jnp.int32(30) - i)
        taken = jnp.sum(jnp.where(gap < larger, weights, 0), axis=-1, keepdims=True, dtype=weights.dtype)
        return jnp.where(taken < goal, larger, last)

    return jax.lax.fori_loop(0, 31, add_bit, jnp.zeros_like(gap[..., :1]))
