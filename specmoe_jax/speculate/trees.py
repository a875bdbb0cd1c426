"""Drafts that branch: shape, growth (EAGLE-2) and lossless acceptance of a tree of tokens.

The nodes of a pass are numbered from the root, which is the last committed token, and parents come before children.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmoe_jax.speculate.acceptance import finite_positions, leading_run
from specmoe_jax.speculate.sampling import choose_coupled, sample, transform_logits
from specmoe_jax.types import AcceptedPath, SamplingRows, Tree


def make_tree(parents: jax.Array, depth: int) -> Tree:
    """The Tree of parents [B, N], those of the nodes after the root; depth: at least the longest path's nodes but the root."""
    batch, count = parents.shape
    parents = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), parents.astype(jnp.int32)], axis=1)  # [B, T]
    mask = jnp.broadcast_to(jnp.eye(count + 1, dtype=bool), (batch, count + 1, count + 1))
    for _ in range(depth):  # each round adds what the parent sees, one generation further up
        mask = mask | jnp.take_along_axis(mask, parents[..., None], axis=1)
    return Tree(parents=parents, depths=jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1, mask=mask)


def rerank(tokens: jax.Array, scores: jax.Array, parents: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
    """The best `keep` of C candidates by cumulative log-probability (Li et al. 2024, EAGLE-2, 4.2).

    tokens, scores, parents: [B, C], parents before children, parents as candidate numbers, -1 for the root. A child is
    never more probable than its parent and ties go to the earlier one, so no kept node misses an ancestor.
    -> tokens [B, keep] and their parents [B, keep] as nodes of a pass.
    """
    chosen = jnp.sort(jax.lax.top_k(scores, keep)[1], axis=-1)  # [B, keep], candidate numbers in order
    rank = jnp.zeros(scores.shape, jnp.int32)
    rank = rank.at[jnp.arange(len(chosen))[:, None], chosen].set(jnp.arange(1, keep + 1, dtype=jnp.int32))
    above = jnp.take_along_axis(parents, chosen, axis=1)
    nodes = jnp.take_along_axis(rank, jnp.maximum(above, 0), axis=1)
    return jnp.take_along_axis(tokens, chosen, axis=1), jnp.where(above < 0, 0, nodes)


def accept_tree(
    keys: jax.Array, tokens: jax.Array, tree: Tree, logits: jax.Array, rows: SamplingRows, *, depth: int
) -> AcceptedPath:
    """Walks down from the root: the target draws at each node, and a child that holds the draw is accepted.

    That is the law of trying the children of a node one by one, each accepted with the target's probability of it and, when
    it is rejected, its probability set to 0 and the rest renormalised (point masses; Miao et al. 2024 for the sibling rule):
    both give a child's token exactly its probability under p. keys: [B], consumed; tokens: [B, N]; logits: [B, N+1, V].
    A node's draw is keyed by its depth: of one depth only one node is ever reached.
    """
    probs = transform_logits(logits, rows)
    node_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, tree.depths)  # [B, T]
    return _walk(jax.vmap(jax.vmap(sample))(node_keys, probs), tokens, tree, depth)


def accept_tree_greedy(tokens: jax.Array, tree: Tree, logits: jax.Array, *, depth: int) -> AcceptedPath:
    """`accept_tree` for rows that are all greedy: the longest path of argmax tokens."""
    return _walk(jnp.argmax(logits, axis=-1).astype(jnp.int32), tokens, tree, depth)


def accept_tree_coupled(
    keys: jax.Array, tokens: jax.Array, tree: Tree, logits: jax.Array, rows: SamplingRows, *, depth: int
) -> AcceptedPath:
    """Deterministic sampling: the draw at a node is its position's own (`choose_coupled`). keys: [B, depth + 1]."""
    node_keys = jax.vmap(lambda row, depths: row[depths])(keys, jnp.minimum(tree.depths, keys.shape[1] - 1))
    return _walk(choose_coupled(node_keys, logits, rows), tokens, tree, depth)


def _walk(choice: jax.Array, tokens: jax.Array, tree: Tree, depth: int) -> AcceptedPath:
    """choice [B, T]: the target's token after each node."""
    tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=-1)  # the root has no parent
    at = functools.partial(jnp.take_along_axis, axis=1)
    node, going = jnp.zeros((len(tokens), 1), jnp.int32), jnp.ones((len(tokens), 1), bool)
    path, accepted = [], jnp.zeros((len(tokens), 1), jnp.int32)
    is_child_of_root = jnp.arange(tokens.shape[1]) > 0
    for _ in range(depth):
        matches = (tree.parents == node) & (tokens == at(choice, node)) & is_child_of_root
        going = going & jnp.any(matches, axis=1, keepdims=True)
        node = jnp.where(going, jnp.argmax(matches, axis=1, keepdims=True).astype(jnp.int32), node)
        path.append(jnp.where(going, node, 0))
        accepted = accepted + going.astype(jnp.int32)
    return AcceptedPath(path=jnp.concatenate(path, axis=1), num_accepted=accepted[:, 0], next_token=at(choice, node)[:, 0])


def decided_path(rule: Callable[..., AcceptedPath]) -> Callable[..., tuple[AcceptedPath, jax.Array]]:
    """What a step asks of a rule of this module, as one program and one array, as acceptance.decided.

    The program takes the rule's arguments by name, and active [B] bool: of another row no token is accepted. -> the path, and
    for the host [B, depth + 3] int32: its nodes, how many are accepted, the next token, and the positions of the path, the root
    among them, before the first without a distribution.
    """

    @functools.partial(jax.jit, static_argnames="depth")
    def program(*, active: jax.Array, logits: jax.Array, depth: int, **given) -> tuple[AcceptedPath, jax.Array]:
        accepted = rule(logits=logits, depth=depth, **given)
        accepted = accepted._replace(num_accepted=jnp.where(active, accepted.num_accepted, 0))
        sound = leading_run(jnp.take_along_axis(finite_positions(logits), from_root(accepted.path), axis=1))
        columns = (accepted.num_accepted, accepted.next_token, sound)
        return accepted, jnp.concatenate([accepted.path, jnp.stack(columns, axis=1)], axis=1)

    return program


def from_root(path: jax.Array) -> jax.Array:
    """The nodes [B, depth + 1] of a path [B, depth], the root first."""
    return jnp.pad(path, ((0, 0), (1, 0)))
