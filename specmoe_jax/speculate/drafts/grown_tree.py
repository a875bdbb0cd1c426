"""How a head grows a tree, generation by generation (Li et al. 2024, EAGLE-2, 4). Pure; its layer is run in between."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.speculate.trees import make_tree, rerank
from specmoe_jax.types import Grown, KVCache, Tree


class Network(Protocol):
    """The module of a head's network: models.eagle.network, models.mtp."""

    def logits(self, head: Any, state: jax.Array, /) -> jax.Array: ...

    def forward_tree(
        self, head: Any, tokens: jax.Array, state: jax.Array, grown: Grown, kv: KVCache, lengths: jax.Array, num_new: jax.Array, /
    ) -> tuple[jax.Array, Grown, KVCache]:
        """The outputs [B, k, M] of a generation of nodes, all that has grown with it, and the cache."""
        ...


class TreeShape(NamedTuple):
    """top_k: branches of a node and nodes kept of a generation. tokens: N, nodes to verify."""

    top_k: int
    tokens: int


def tree_shape(plan: Plan) -> TreeShape | None:
    """That of a plan, None where it drafts a chain."""
    if plan.draft_tree_tokens is None:
        return None
    assert plan.draft_tree_top_k is not None
    return TreeShape(top_k=plan.draft_tree_top_k, tokens=plan.draft_tree_tokens)


class Growing(NamedTuple):
    """A tree of some generations. candidates: tokens, scores and parents (as candidate numbers, -1 the root) [B, C] of each.

    beam [B, k]: the last generation's best, with their scores, candidate numbers and the features [B, k, M] of their parents.
    parents [B, E]: of all nodes kept so far, the beam last. k, v: of all but the beam.
    """

    candidates: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
    beam: jax.Array
    scores: jax.Array
    numbers: jax.Array
    features: jax.Array
    parents: jax.Array
    k: jax.Array
    v: jax.Array


def sprout(attention: AttentionConfig, shape: TreeShape, logits: jax.Array, feature: jax.Array) -> Growing:
    """The first generation, the children of the root. logits [B, V] of the feature [B, M]; attention: of the head's layer."""
    top_k, batch = shape.top_k, len(feature)
    columns = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32), (batch, top_k))
    nothing = jnp.zeros((batch, 0, attention.num_kv_heads, attention.head_dim), feature.dtype)
    scores, beam = jax.lax.top_k(jax.nn.log_softmax(logits), top_k)  # [B, k]
    return Growing(
        candidates=((beam, scores, jnp.full((batch, top_k), -1, jnp.int32)),),
        beam=beam,
        scores=scores,
        numbers=columns,
        features=jnp.broadcast_to(feature[:, None], (batch, top_k, feature.shape[-1])),
        parents=jnp.zeros((batch, top_k), jnp.int32),
        k=nothing,
        v=nothing,
    )


def forest(growing: Growing, generation: int) -> Grown:
    """The nodes after the root as a forest: the root's row is in the cache already, as the last committed one."""
    tree = make_tree(growing.parents, generation)
    tree = Tree(parents=tree.parents[:, 1:], depths=tree.depths[:, 1:] - 1, mask=tree.mask[:, 1:, 1:])
    return Grown(k=growing.k, v=growing.v, tree=tree)


def branch(
    shape: TreeShape, generation: int, growing: Growing, logits: jax.Array, outputs: jax.Array, k: jax.Array, v: jax.Array
) -> Growing:
    """The next generation: the best children of the beam, whose outputs [B, k, M] the head has computed; k, v: with the beam's."""
    top_k, batch = shape.top_k, len(outputs)
    chances, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), top_k)  # [B, k, k]
    totals = (growing.scores[..., None] + chances).reshape(batch, -1)
    tokens, first = tokens.reshape(batch, -1), top_k + (generation - 1) * top_k**2
    scores, best = jax.lax.top_k(totals, top_k)
    parent = best // top_k
    return Growing(
        candidates=(*growing.candidates, (tokens, totals, jnp.repeat(growing.numbers, top_k, axis=1))),
        beam=jnp.take_along_axis(tokens, best, axis=1),
        scores=scores,
        numbers=first + best,
        features=jnp.take_along_axis(outputs, parent[..., None], axis=1),
        parents=jnp.concatenate([growing.parents, 1 + (generation - 1) * top_k + parent], axis=1),
        k=k,
        v=v,
    )


def harvest(shape: TreeShape, depth: int, growing: Growing) -> tuple[jax.Array, Tree]:
    """The best nodes of all generations. -> tokens [B, N], Tree."""
    tokens, scores, above = (jnp.concatenate(part, axis=1) for part in zip(*growing.candidates, strict=True))
    tokens, nodes = rerank(tokens, scores, above, shape.tokens)
    return tokens, make_tree(nodes, depth)


def grow(
    network: Network,
    attention: AttentionConfig,
    head: Any,
    shape: TreeShape,
    depth: int,
    feature: jax.Array,
    kv: KVCache,
    lengths: jax.Array,
    num_new: jax.Array,
) -> tuple[jax.Array, Tree, KVCache]:
    """Grows and reranks a tree in every row. -> tokens [B, N], Tree, the head's cache.

    feature: [B, M], what was predicted after the last committed token but one. The last generation is not run through the
    head: its nodes have no children. Probabilities are the head's own, before temperature.
    """
    growing = sprout(attention, shape, network.logits(head, feature), feature)
    for generation in range(1, depth):
        grown = forest(growing, generation)
        outputs, grown, kv = network.forward_tree(head, growing.beam, growing.features, grown, kv, lengths, num_new)
        growing = branch(shape, generation, growing, network.logits(head, outputs), outputs, grown.k, grown.v)
    return *harvest(shape, depth, growing), kv
