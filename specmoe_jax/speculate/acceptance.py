"""Lossless acceptance: which drafted tokens the target keeps, and the token it adds (Leviathan et al. 2023, Alg. 1).

Whatever the draft, the tokens committed have the target's own law, provided that `draft_probs` is what the tokens
were really drawn from. A token picked by argmax, or looked up, was drawn from a point mass: pass None for it, never
the softmax it was picked from, which would favour it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.speculate.logit_edits import edit_kinds
from specmoe_jax.speculate.sampling import choose_coupled, sample, sampling_rows, transform_logits
from specmoe_jax.types import AcceptResult, SamplingRows


def accept(
    keys: jax.Array,
    draft_tokens: jax.Array,
    draft_probs: jax.Array | None,
    target_logits: jax.Array,
    params: SamplingParams | SamplingRows,
) -> AcceptResult:
    """Keeps the longest accepted run of each row and samples the target's token after it. The keys are consumed.

    Leviathan et al. 2023, Alg. 1: token x drawn from q is accepted with probability min(1, p(x) / q(x)); the first that is
    rejected is replaced by a draw from max(p - q, 0), renormalised; after N accepted ones, one more is drawn from p.
    p is the target's distribution after temperature, top-k and top-p. For a row of temperature 0 this is equality
    with the argmax, so a batch may mix greedy and sampled rows. A token outside 0..V-1 is no proposal: it is
    rejected and the row draws from p, if its q is 0 everywhere.

    keys: one key, or [B] keys, then row b's result depends on row b's arguments only; draft_tokens: [B, N] int,
    N may be 0; draft_probs: [B, N, V] float32, or None for point masses; target_logits: [B, N+1, V];
    params: SamplingParams for all rows, static under jit, or SamplingRows of arrays [B]. A row with NaN logits gets
    some token of 0..V-1: check `finite_positions`. Raises ValueError when the shapes
    disagree, or params asks for edits of logits (penalties, biases), which come before.
    """
    _check_shapes(draft_tokens, draft_probs, target_logits)
    if isinstance(params, SamplingParams):
        if edit_kinds([params]) is not None:
            raise ValueError("params asks for edits of logits; edit them (speculate.logit_edits) and give the params without")
        if params.temperature == 0:
            return accept_greedy(draft_tokens, target_logits)
        params = sampling_rows([params] * len(draft_tokens))
    accept_keys, next_keys = _two_keys_a_row(keys, len(draft_tokens))
    target_probs = transform_logits(target_logits, params)
    chances = accept_chances(draft_tokens, draft_probs, target_probs)
    draws = jax.vmap(lambda key: jax.random.uniform(key, draft_tokens.shape[1:]))(accept_keys)  # [B, N] in [0, 1)
    num_accepted = leading_run(draws < chances)
    next_probs = next_distribution(num_accepted, draft_tokens, draft_probs, target_probs)
    return AcceptResult(num_accepted=num_accepted, next_token=sample(next_keys, next_probs))


def accept_greedy(draft_tokens: jax.Array, target_logits: jax.Array) -> AcceptResult:
    """`accept` for rows that are all greedy, without a probability or a key: equality with the argmax.

    draft_tokens: [B, N] int; target_logits: [B, N+1, V]. Ties of the argmax go to the smaller id.
    """
    return _accept_equal(draft_tokens, jnp.argmax(target_logits, axis=-1).astype(jnp.int32))


def accept_coupled(keys: jax.Array, draft_tokens: jax.Array, target_logits: jax.Array, rows: SamplingRows) -> AcceptResult:
    """Deterministic sampling: equality with the token that each position's own noise picks (`choose_coupled`).

    keys: [B, N+1], of (seed, request, position) alone, consumed; draft_tokens: [B, N]; target_logits: [B, N+1, V].
    The tokens committed have the target's law and are the same whatever was drafted.
    """
    return _accept_equal(draft_tokens, choose_coupled(keys, target_logits, rows))


def _accept_equal(draft_tokens: jax.Array, choice: jax.Array) -> AcceptResult:
    """draft_tokens: [B, N]; choice: [B, N+1], the target's token at each position."""
    num_accepted = leading_run(draft_tokens == choice[:, :-1])
    return AcceptResult(num_accepted=num_accepted, next_token=_at(choice, num_accepted))


def synthetic_accept(keys: jax.Array, draft_tokens: jax.Array, target_logits: jax.Array, rate: jax.Array) -> AcceptResult:
    """Each drafted token is accepted with probability `rate`, whatever it is: for the speed of models with random weights.

    The text is meaningless and every figure that it touches is stamped. The token after the run is the target's
    argmax. keys: [B]; draft_tokens: [B, N], below 0 no proposal; target_logits: [B, N+1, V].
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, draft_tokens.shape[1:]))(keys)
    num_accepted = leading_run((draws < rate) & (draft_tokens >= 0))
    choice = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
    return AcceptResult(num_accepted=num_accepted, next_token=_at(choice, num_accepted))


def accept_chances(draft_tokens: jax.Array, draft_probs: jax.Array | None, target_probs: jax.Array) -> jax.Array:
    """Probability [B, N] that each drafted token is accepted, given that those before it are."""
    proposed = (draft_tokens >= 0) & (draft_tokens < target_probs.shape[-1])
    p = _of_tokens(target_probs[:, :-1], draft_tokens)
    q = jnp.ones_like(p) if draft_probs is None else _of_tokens(draft_probs, draft_tokens)
    return jnp.where(proposed, accept_probability(p, q), 0.0)


def accept_probability(p: jax.Array, q: jax.Array) -> jax.Array:
    """min(1, p / q), elementwise; where q is 0 the limit: 1, or 0 when p is 0 too.

    >>> accept_probability(jnp.array([0.2, 0.5, 0.3, 0.0]), jnp.array([0.4, 0.1, 0.0, 0.0])).tolist()
    [0.5, 1.0, 1.0, 0.0]
    """
    ratio = p / jnp.where(q > 0, q, 1.0)
    return jnp.where(q > 0, jnp.minimum(ratio, 1.0), (p > 0).astype(p.dtype))


def next_distribution(
    num_accepted: jax.Array, draft_tokens: jax.Array, draft_probs: jax.Array | None, target_probs: jax.Array
) -> jax.Array:
    """Law [B, V] of the token after `num_accepted` [B] drafted ones: the residual, or p itself after all N."""
    p = _at(target_probs, num_accepted)
    if draft_probs is None:
        tokens = jnp.pad(draft_tokens, ((0, 0), (0, 1)), constant_values=-1)  # the one-hot of -1 is 0 everywhere
        q = jax.nn.one_hot(_at(tokens, num_accepted), p.shape[-1], dtype=p.dtype)
    else:
        q = _at(jnp.pad(draft_probs, ((0, 0), (0, 1), (0, 0))), num_accepted)
    return residual(p, q)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """max(p - q, 0) renormalised along the last axis.

    p itself where nothing is left: that is p = q up to rounding, where a token is rejected with probability 0 up to
    rounding. A small remainder is kept, not rounded away: beside a point mass it is exact.
    """
    rest = jnp.maximum(p - q, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    some = total > jnp.finfo(p.dtype).tiny
    return jnp.where(some, rest / jnp.where(some, total, 1.0), p)


def finite_positions(target_logits: jax.Array) -> jax.Array:
    """Positions [B, T] whose logits [B, T, V] give a distribution: no NaN, no +inf, and not -inf everywhere."""
    return jnp.isfinite(jnp.max(target_logits, axis=-1))


def decided(rule: Callable[..., AcceptResult]) -> Callable[..., jax.Array]:
    """What a step asks of a rule of this module, as one program and one array, since the host waits for each that it reads.

    The program takes the rule's arguments by name and gives [3, B] int32: the drafted tokens accepted, the next token, and
    the positions before the first without a distribution.
    """

    @jax.jit
    def program(*, target_logits: jax.Array, **given) -> jax.Array:
        result = rule(target_logits=target_logits, **given)
        return jnp.stack([result.num_accepted, result.next_token, leading_run(finite_positions(target_logits))])

    return program


def leading_run(accepted: jax.Array) -> jax.Array:
    """Length [B] int32 of the run of True that each row of [B, N] starts with.

    >>> leading_run(jnp.array([[True, True, False], [False, True, True]])).tolist()
    [2, 0]
    """
    return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=1), axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]]: [B, T, ...] and [B] -> [B, ...]."""
    return jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


def _of_tokens(probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """Probabilities [B, N] of tokens [B, N] under [B, N, V]; meaningless for tokens outside 0..V-1."""
    return jnp.take_along_axis(probs, tokens[..., None], axis=-1, mode="clip")[..., 0]


def _two_keys_a_row(keys: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """One key, or [B], typed or not, to two independent keys a row, [B] each."""
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(keys)
    if keys.ndim == 0:
        keys = jax.random.split(keys, batch)
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _check_shapes(draft_tokens: jax.Array, draft_probs: jax.Array | None, target_logits: jax.Array) -> None:
    (batch, drafted), vocab = draft_tokens.shape, target_logits.shape[-1]
    if target_logits.shape != (batch, drafted + 1, vocab):
        raise ValueError(
            f"target_logits has shape {target_logits.shape}; {drafted} drafted tokens in {batch} rows need "
            f"{(batch, drafted + 1, vocab)}"
        )
    if draft_probs is not None and draft_probs.shape != (batch, drafted, vocab):
        raise ValueError(f"draft_probs has shape {draft_probs.shape}; it must be {(batch, drafted, vocab)}")
