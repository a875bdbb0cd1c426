"""SpecMoE's draft: the model itself, with a few resident experts per layer in the place of all."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.speculate.drafts.protocol import DraftView, TokenChoice
from specmoe_jax.speculate.logit_edits import LogitEdits, edit_logits
from specmoe_jax.speculate.sampling import choose_coupled, sample, transform_logits
from specmoe_jax.types import KVCache, Proposal, SamplingRows


class SelfDraft:
    """Drafts with the engine's resident experts (SpecMoE, draft model). No state of its own.

    Substitution happens in the slot tables (substitution.py), so the draft is the target's own forward.
    """

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        assert view.forward is not None  # the plan keeps draft experts
        run = view.chain or functools.partial(feed_back, view.forward)
        tokens, probs, kv = run(view.kv, view.last_token, view.lengths, view.choice, view.length)
        return Proposal(tokens=tokens, probs=probs), kv


def feed_back(
    forward: Callable, kv: KVCache, token, lengths, choice: TokenChoice, length: int
) -> tuple[jax.Array, jax.Array | None, KVCache]:
    """What DraftView.chain says, a call of `forward` after the other."""
    tokens, probs = [], []
    for position in range(length):
        logits, kv = forward(kv, token, lengths + np.int32(position))
        token, q = choose_token(choice, np.int32(position), logits, so_far(tokens, choice, length))
        tokens.append(token)
        probs += [] if q is None else [q]
    return jnp.stack(tokens, 1), jnp.stack(probs, 1) if probs else None, kv


def so_far(tokens: Sequence[jax.Array], choice: TokenChoice, length: int) -> jax.Array | None:
    """Drafted tokens, arrays [B], as `choose_token` takes them; None where no logit depends on them."""
    if choice.edits is None:
        return None
    beyond = np.zeros(len(choice.rows.temperature), np.int32)
    return jnp.stack([*tokens, *[beyond] * (length - len(tokens))], axis=1)


def choose_token(
    choice: TokenChoice, position, logits: jax.Array, drafted: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The drafted token [B] at a position of the step by the rows' parameters, and its distribution [B, V] if drawn.

    position: int32, of numpy or traced. drafted: [B, N] int32, of which the first `position` columns are the tokens before it in
    the step; needed where logits are edited.
    """
    if choice.edits is not None:
        masks = choice.masks and choice.masks(int(position), drafted)
        logits = _edit(logits, choice.edits._replace(masks=masks), drafted, position)
    if choice.keys is None:  # all rows are greedy
        return _argmax(logits), None
    if choice.coupled is not None:
        return _choose_coupled(choice.coupled, position, logits, choice.rows), None
    return _draw(choice.keys, position, logits, choice.rows)


@jax.jit
def _edit(logits: jax.Array, edits: LogitEdits, drafted: jax.Array, position: jax.Array) -> jax.Array:
    paths = jnp.where(jnp.arange(drafted.shape[1]) < position, drafted, -1)[:, None]  # [B, 1, N]
    return edit_logits(logits[:, None], edits, paths)[:, 0]


@jax.jit
def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def _choose_coupled(keys: jax.Array, position: jax.Array, logits: jax.Array, rows: SamplingRows) -> jax.Array:
    return choose_coupled(keys[:, position, None], logits[:, None], rows)[:, 0]


@jax.jit
def _draw(keys: jax.Array, position: jax.Array, logits: jax.Array, rows: SamplingRows) -> tuple[jax.Array, jax.Array]:
    """One token per row from the transformed distribution, which is also what acceptance must be told."""
    probs = transform_logits(logits, rows)
    keys = jax.vmap(functools.partial(jax.random.fold_in, data=position))(keys)
    return jax.vmap(sample)(keys, probs), probs
