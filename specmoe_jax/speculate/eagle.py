"""EAGLE as a draft: its own cache, fed by the target's hidden states of what was committed (Li et al. 2024; SpecMoEOff 4)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models import eagle
from specmoe_jax.models.eagle import EagleHead
from specmoe_jax.speculate.draft import DraftView
from specmoe_jax.speculate.self_draft import choose_token
from specmoe_jax.types import KVCache, Proposal


class EagleMemory(NamedTuple):
    """kv: the head's cache, one layer; rows 0..lengths-1 come from the target's features, what is beyond is overwritten.

    feature: [B, M], what the head predicts after the last committed token but one; zero where nothing was observed.
    """

    kv: KVCache
    feature: jax.Array


class EagleDraft(NamedTuple):
    """Drafts with a head whose weights are on the accelerator.

    A step: the target's features of the committed tokens extend the head's cache (`observe`), which gives the first
    token; each further one feeds the head's own prediction back. A one-token prompt has no feature yet: its first
    draft is made from zeros, and verification decides as always.
    """

    head: EagleHead

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.head.config.feature_layers

    def new_memory(self, rows: int, positions: int) -> EagleMemory:
        layer, weights = self.head.config.layer.attention, self.head.weights.fc
        shape = (rows, layer.num_kv_heads, positions, layer.cache_dim)
        k, v = (jnp.zeros(shape, weights.dtype, device=weights.device) for _ in range(2))
        feature = jnp.zeros((rows, self.head.config.hidden_size), weights.dtype, device=weights.device)
        return EagleMemory(kv=KVCache(k=(k,), v=(v,)), feature=feature)

    def observe(self, memory: EagleMemory, rows, following, features, lengths, num_new) -> EagleMemory:
        return _observe(self.head, memory, rows, following, features, lengths, num_new)

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        memory = view.memory
        kv, feature, num_new = memory.kv, _known(memory.feature, view.lengths), view.active.astype(np.int32)
        logits, tokens, probs = _logits(self.head, feature), [], []
        for position in range(view.length):
            if position:
                at = view.lengths + np.int32(position - 1)
                logits, feature, kv = _next(self.head, tokens[-1], feature, kv, at, num_new)
            token, q = choose_token(view, position, logits)
            tokens.append(token)
            probs += [] if q is None else [q]
        drafted = Proposal(tokens=jnp.stack(tokens, 1), probs=jnp.stack(probs, 1) if probs else None, memory=memory._replace(kv=kv))
        return drafted, view.kv


@functools.partial(jax.jit, donate_argnums=1)
def _observe(head: EagleHead, memory: EagleMemory, rows, following, features, lengths, num_new) -> EagleMemory:
    """See speculate.draft.FeatureDraft."""
    with jax.named_scope("eagle_observe"):
        feature = eagle.fuse(head.weights, features.astype(head.weights.fc.dtype))
        predicted, kv = eagle.forward(head, following, feature, memory.kv, rows, lengths, num_new)
        last = jnp.take_along_axis(predicted, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]  # [b, M]
        kept = jnp.where((rows >= 0) & (num_new > 0), rows, len(memory.feature))  # a row without anything new keeps its own
        return EagleMemory(kv=kv, feature=memory.feature.at[kept].set(last, mode="drop"))


@jax.jit
def _known(feature: jax.Array, lengths: jax.Array) -> jax.Array:
    """Zeros where no position was observed: what an earlier request left in a row must not reach the next."""
    return jnp.where(jnp.asarray(lengths)[:, None] > 0, feature, 0)


_logits = jax.jit(eagle.logits)


@functools.partial(jax.jit, donate_argnums=3)
def _next(head: EagleHead, token, feature, kv: KVCache, lengths, num_new):
    """One fed-back row of every sequence: token [B], feature [B, M] -> logits [B, V], feature [B, M], kv."""
    with jax.named_scope("eagle_next"):
        rows = jnp.arange(len(token), dtype=jnp.int32)
        predicted, kv = eagle.forward(head, token[:, None], feature[:, None], kv, rows, lengths, num_new)
        return eagle.logits(head, predicted[:, 0]), predicted[:, 0], kv
