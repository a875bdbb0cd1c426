"""EAGLE as a draft: its own cache, fed by the target's hidden states of what was committed (Li et al. 2024; SpecMoEOff 4)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.speculate.drafts.grown_tree import TreeShape, grow
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.speculate.drafts.self_draft import choose_token, so_far
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
    token; each further one feeds the head's own prediction back. With a tree (EAGLE-2) each generation keeps the top_k
    nodes of the greatest cumulative probability, and `tokens` of all are verified. A one-token prompt has no feature yet: its first
    draft is made from zeros, and verification decides as always.
    """

    head: EagleHead
    tree: TreeShape | None = None

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
        kv, feature, num_new = memory.kv, known(memory.feature, view.lengths), view.active.astype(np.int32)
        if self.tree is not None:
            tokens, tree, kv = _grow(self.head, self.tree, view.length, feature, kv, view.lengths, num_new)
            return Proposal(tokens=tokens, probs=None, memory=memory._replace(kv=kv), tree=tree), view.kv

        def advance(token, feature, at):
            nonlocal kv
            logits, feature, kv = _next(self.head, token, feature, kv, at, num_new)
            return logits, feature

        tokens, probs = draft_chain(head_logits(self.head, feature), view, feature, advance)
        return Proposal(tokens=tokens, probs=probs, memory=memory._replace(kv=kv)), view.kv


def draft_chain(logits: jax.Array, view: DraftView, feature: jax.Array, advance: Callable) -> tuple[jax.Array, jax.Array | None]:
    """Feeds the head its own predictions. -> tokens [B, N], and their distributions [B, N, V] where they were drawn.

    logits, feature: [B, V] and [B, M], after the last committed token but one. advance: (token [B], feature, lengths) ->
    logits [B, V], feature, by one further row of the head.
    """
    tokens, probs = [], []
    for position in range(view.length):
        if position:
            logits, feature = advance(tokens[-1], feature, view.lengths + np.int32(position - 1))
        token, q = choose_token(view.choice, np.int32(position), logits, so_far(tokens, view.choice, view.length))
        tokens.append(token)
        probs += [] if q is None else [q]
    return jnp.stack(tokens, 1), jnp.stack(probs, 1) if probs else None


@functools.partial(jax.jit, donate_argnums=1)
def _observe(head: EagleHead, memory: EagleMemory, rows, following, features, lengths, num_new) -> EagleMemory:
    """See speculate.drafts.protocol.FeatureDraft."""
    with jax.named_scope("eagle_observe"):
        feature = eagle.fuse(head, features.astype(head.weights.fc.dtype))
        predicted, kv = eagle.forward(head, following, feature, memory.kv, rows, lengths, num_new)
        return EagleMemory(kv=kv, feature=remember(memory.feature, predicted, rows, num_new))


def remember(feature: jax.Array, predicted: jax.Array, rows, num_new) -> jax.Array:
    """feature [B, M] with what was predicted [b, T, M] after the last new position of each of `rows`; others keep their own."""
    last = jnp.take_along_axis(predicted, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]  # [b, M]
    kept = jnp.where((rows >= 0) & (num_new > 0), rows, len(feature))
    return feature.at[kept].set(last, mode="drop")


@jax.jit
def known(feature: jax.Array, lengths: jax.Array) -> jax.Array:
    """Zeros where no position was observed: the state of an earlier request in a row must not reach the next."""
    return jnp.where(jnp.asarray(lengths)[:, None] > 0, feature, 0)


head_logits = jax.jit(eagle.logits)


@functools.partial(jax.jit, donate_argnums=3)
def _next(head: EagleHead, token, feature, kv: KVCache, lengths, num_new):
    """One fed-back row of every sequence: token [B], feature [B, M] -> logits [B, V], feature [B, M], kv."""
    with jax.named_scope("eagle_next"):
        rows = jnp.arange(len(token), dtype=jnp.int32)
        predicted, kv = eagle.forward(head, token[:, None], feature[:, None], kv, rows, lengths, num_new)
        return eagle.logits(head, predicted[:, 0]), predicted[:, 0], kv


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=4)
def _grow(head: EagleHead, shape: TreeShape, depth: int, feature, kv: KVCache, lengths, num_new):
    with jax.named_scope("eagle_grow"):
        return grow(eagle, head.config.layer.attention, head, shape, depth, feature, kv, lengths, num_new)
