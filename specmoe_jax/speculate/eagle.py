"""EAGLE as a draft: its own cache, fed by the target's hidden states of what was committed (Li et al. 2024; SpecMoEOff 4)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config import Plan
from specmoe_jax.models import eagle
from specmoe_jax.models.eagle import EagleHead
from specmoe_jax.speculate.draft import DraftView
from specmoe_jax.speculate.self_draft import choose_token
from specmoe_jax.speculate.tree import make_tree, rerank
from specmoe_jax.types import KVCache, Proposal, Tree


class EagleMemory(NamedTuple):
    """kv: the head's cache, one layer; rows 0..lengths-1 come from the target's features, what is beyond is overwritten.

    feature: [B, M], what the head predicts after the last committed token but one; zero where nothing was observed.
    """

    kv: KVCache
    feature: jax.Array


class TreeShape(NamedTuple):
    """top_k: branches of a node and nodes kept of a generation. tokens: N, nodes to verify."""

    top_k: int
    tokens: int


def tree_shape(plan: Plan) -> TreeShape | None:
    """That of a plan, None where it drafts a chain."""
    return None if plan.draft_tree_tokens is None else TreeShape(top_k=plan.draft_tree_top_k, tokens=plan.draft_tree_tokens)


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
        kv, feature, num_new = memory.kv, _known(memory.feature, view.lengths), view.active.astype(np.int32)
        if self.tree is not None:
            tokens, tree, kv = _grow(self.head, self.tree, view.length, feature, kv, view.lengths, num_new)
            return Proposal(tokens=tokens, probs=None, memory=memory._replace(kv=kv), tree=tree), view.kv
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


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=4)
def _grow(head: EagleHead, shape: TreeShape, depth: int, feature, kv: KVCache, lengths, num_new):
    """Grows and reranks a tree in every row (Li et al. 2024, EAGLE-2, 4). -> tokens [B, N], Tree, kv.

    feature: [B, M], what was predicted after the last committed token but one. The last generation is not run through the
    head: its nodes have no children. Probabilities are the head's own, before temperature.
    """
    top_k, batch, layer = shape.top_k, len(feature), head.config.layer.attention
    columns = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32), (batch, top_k))
    nothing = jnp.zeros((batch, 0, layer.num_kv_heads, layer.head_dim), feature.dtype)
    keys, values = nothing, nothing
    scores, beam = jax.lax.top_k(jax.nn.log_softmax(eagle.logits(head, feature)), top_k)  # [B, k]
    candidates = [(beam, scores, jnp.full((batch, top_k), -1, jnp.int32))]  # tokens, scores, parents' candidate numbers
    numbers, parents = columns, jnp.zeros((batch, top_k), jnp.int32)  # the beam's candidate numbers; all parents, as nodes
    features = jnp.broadcast_to(feature[:, None], (batch, top_k, feature.shape[-1]))
    for generation in range(1, depth):
        forest = _without_root(make_tree(parents, generation))
        grown = eagle.Grown(k=keys, v=values, tree=forest)
        outputs, grown, kv = eagle.forward_tree(head, beam, features, grown, kv, lengths, num_new)
        keys, values = grown.k, grown.v
        chances, tokens = jax.lax.top_k(jax.nn.log_softmax(eagle.logits(head, outputs)), top_k)  # [B, k, k]
        totals = (scores[..., None] + chances).reshape(batch, -1)
        first = top_k + (generation - 1) * top_k**2
        candidates.append((tokens.reshape(batch, -1), totals, jnp.repeat(numbers, top_k, axis=1)))
        scores, best = jax.lax.top_k(totals, top_k)
        beam = jnp.take_along_axis(tokens.reshape(batch, -1), best, axis=1)
        numbers, parent = first + best, best // top_k
        features = jnp.take_along_axis(outputs, parent[..., None], axis=1)
        parents = jnp.concatenate([parents, 1 + (generation - 1) * top_k + parent], axis=1)
    tokens, scores, above = (jnp.concatenate(part, axis=1) for part in zip(*candidates, strict=True))
    tokens, nodes = rerank(tokens, scores, above, shape.tokens)
    return tokens, make_tree(nodes, depth), kv


def _without_root(tree: Tree) -> Tree:
    """The nodes after the root as a forest: the root's row is in the cache already, as the last committed one."""
    return Tree(parents=tree.parents[:, 1:], depths=tree.depths[:, 1:] - 1, mask=tree.mask[:, 1:, 1:])
