"""Which tokens are read in which passes so that every continuation gets its log-probabilities. Pure.

Texts of one context are read as one row: the context once, then the continuations as branches of a tree. The nodes of a tree are
numbered as those of drafts are: the root, which is the context's last token, comes first, and parents before children.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from specmoe_jax.engine.scoring.texts import ScoredText
from specmoe_jax.ops import MAX_NEW
from specmoe_jax.types import Tree

CHAIN = -1  # in the place of a tree's number


class Branches(NamedTuple):
    """A tree of tokens behind a chain. tokens, parents: of its nodes, the root's parent is itself."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]


class ReadRow(NamedTuple):
    """What one row of the cache reads: a chain of tokens, then trees, each in the place of the one before.

    prefix: the row that reads the first `shared` tokens of the chain for it, None where it does so itself.
    """

    chain: tuple[int, ...]
    trees: tuple[Branches, ...] = ()
    source: tuple[int, ...] = ()
    prefix: int | None = None
    shared: int = 0

    @property
    def num_read(self) -> int:
        """Tokens that go through the model."""
        return len(self.chain) - self.shared + sum(len(tree.tokens) for tree in self.trees)


class Place(NamedTuple):
    """Where a token is predicted: after the position of a row's chain, or after the node of one of its trees."""

    row: int
    tree: int
    position: int


class Query(NamedTuple):
    """token: of which the log-probability is asked. text, index: the continuation and the place in it."""

    token: int
    text: int
    index: int


class Layout(NamedTuple):
    """unscored: of each row the positions of its chain before the first that is asked about."""

    rows: tuple[ReadRow, ...]
    queries: dict[Place, list[Query]]
    unscored: tuple[int, ...]


class ReadPass(NamedTuple):
    """A chunk of some rows' chains, or one tree of each: tokens [b, T] at positions lengths[b] + t, or + depth.

    rows: [b] int32, -1 for padding. tree: which of the rows' trees, CHAIN for none. parents: [b, T] of a tree's nodes, else None.
    """

    rows: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    num_new: np.ndarray
    tree: int = CHAIN
    parents: np.ndarray | None = None

    @property
    def shape_of_tree(self) -> Tree | None:
        """Of a pass over trees."""
        if self.parents is None:
            return None
        rows, mask = np.arange(len(self.parents)), np.zeros((*self.parents.shape, self.parents.shape[1]), bool)
        for node in range(self.parents.shape[1]):
            mask[:, node] = mask[rows, self.parents[:, node]]
            mask[:, node, node] = True
        arrays: tuple[Any, ...] = (self.parents, mask.sum(-1, dtype=np.int32) - 1, mask)  # of the host
        return Tree(*arrays)

    def places(self) -> Iterator[tuple[int, Place]]:
        """Of every token that is read: its place in the flattened pass, and in the layout."""
        width = self.tokens.shape[1]
        for b in np.flatnonzero(self.rows >= 0).tolist():
            first = int(self.lengths[b]) if self.tree == CHAIN else 0
            for t in range(int(self.num_new[b])):
                yield b * width + t, Place(int(self.rows[b]), self.tree, first + t)


def layout(texts: Sequence[ScoredText], *, share: bool = True) -> Layout:
    """share: whether texts of one context share a row; False reads every text on its own."""
    rows: list[ReadRow] = []
    queries: dict[Place, list[Query]] = collections.defaultdict(list)
    groups = _groups(texts, share)
    for group in groups:
        if len(group) == 1:
            _add_chain(rows, queries, texts, group[0])
        else:
            _add_trees(rows, queries, texts, group)
    return Layout(tuple(rows), dict(queries), tuple(len(texts[group[0]].context) - 1 for group in groups))


def _groups(texts: Sequence[ScoredText], share: bool) -> list[list[int]]:
    """Numbers of the texts that share a row; a continuation that is too long for a tree stays alone."""
    groups: dict = collections.defaultdict(list)
    for number, text in enumerate(texts):
        fits = share and not text.source and len(text.continuation) <= MAX_NEW
        groups[text.context if fits else number].append(number)
    return list(groups.values())


def _add_chain(rows: list[ReadRow], queries, texts: Sequence[ScoredText], number: int) -> None:
    context, continuation, source = texts[number]
    for index, token in enumerate(continuation):
        queries[Place(len(rows), CHAIN, len(context) - 1 + index)].append(Query(token, number, index))
    rows.append(ReadRow(chain=(*context, *continuation[:-1]), source=source))


def _add_trees(rows: list[ReadRow], queries, texts: Sequence[ScoredText], group: list[int]) -> None:
    """As few trees as the continuations, in their order, take."""
    context, trees = texts[group[0]].context, []
    nodes: dict[tuple[int, ...], int] = {(): 0}  # of the last tree, by the tokens from its root on
    parents = [0]

    def finish() -> None:
        tokens = (context[-1], *(path[-1] for path in list(nodes)[1:]))
        trees.append(Branches(tokens, tuple(parents)))

    for number in group:
        continuation = texts[number].continuation
        missing = sum(continuation[:i] not in nodes for i in range(1, len(continuation)))
        if len(nodes) + missing > MAX_NEW:
            finish()
            nodes.clear()
            nodes[()], parents = 0, [0]
        for index, token in enumerate(continuation):
            path = continuation[:index]
            if path not in nodes:
                parents.append(nodes[path[:-1]])
                nodes[path] = len(nodes)
            queries[Place(len(rows), len(trees), nodes[path])].append(Query(token, number, index))
    finish()
    rows.append(ReadRow(chain=context[:-1], trees=tuple(trees)))


def tree_nodes(rows: Sequence[ReadRow]) -> int:
    """T of the passes over trees: the largest, a power of two; 0 without trees."""
    largest = max((len(tree.tokens) for row in rows for tree in row.trees), default=0)
    return largest and 1 << (largest - 1).bit_length()


def row_positions(row: ReadRow) -> int:
    """Cache positions that it fills: of its chain, and of the largest of its trees."""
    return len(row.chain) + max((len(tree.tokens) for tree in row.trees), default=0)


def read_passes(
    rows: Sequence[ReadRow], numbers: Sequence[int], *, width: int, chunk: int, nodes: int, tree_width: int | None = None
) -> list[ReadPass]:
    """The passes over some of the rows, chains before trees. A row's chunks and its trees come in their order.

    numbers: of the rows to read, those beside each other in a pass. width, tree_width: b of a pass; without tree_width a row has
    the same place in the passes over trees as in those over chains. nodes: T of trees.
    """
    passes = []
    for group in _split(numbers, width):
        longest = max(len(rows[number].chain) - rows[number].shared for number in group)
        passes += [_chunk(rows, group, start, width, chunk) for start in range(0, longest, chunk)]
    branching = numbers if tree_width is None else [number for number in numbers if rows[number].trees]
    for group in _split(branching, tree_width or width):
        count = max(len(rows[number].trees) for number in group)
        passes += [_tree(rows, group, tree, tree_width or width, nodes) for tree in range(count)]
    return passes


def _split(numbers: Sequence[int], width: int) -> list[Sequence[int]]:
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]


def _empty(group: Sequence[int], width: int, columns: int) -> ReadPass:
    rows = np.full(width, -1, np.int32)
    rows[: len(group)] = group
    zeros = np.zeros((2, width), np.int32)
    return ReadPass(rows=rows, tokens=np.zeros((width, columns), np.int32), lengths=zeros[0], num_new=zeros[1])


def _chunk(rows: Sequence[ReadRow], group: Sequence[int], start: int, width: int, chunk: int) -> ReadPass:
    done = _empty(group, width, chunk)
    for b, number in enumerate(group):
        chain, first = rows[number].chain, rows[number].shared + start
        piece = chain[first : first + chunk]
        done.tokens[b, : len(piece)] = piece
        done.lengths[b], done.num_new[b] = min(first, len(chain)), len(piece)
    return done


def _tree(rows: Sequence[ReadRow], group: Sequence[int], tree: int, width: int, nodes: int) -> ReadPass:
    done = _empty(group, width, nodes)
    parents = np.zeros((width, nodes), np.int32)
    for b, number in enumerate(group):
        done.lengths[b] = len(rows[number].chain)
        if tree < len(rows[number].trees):
            branches = rows[number].trees[tree]
            count = done.num_new[b] = len(branches.tokens)
            done.tokens[b, :count], parents[b, :count] = branches.tokens, branches.parents
    return done._replace(tree=tree, parents=parents)
