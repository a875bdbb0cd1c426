"""Beginnings that rows have in common, read once into pages that all of them attend (a paged cache). Pure.

Few-shot examples stand before every question of a task. Only whole pages are shared, and nobody writes to them.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from specmoe_jax.engine.scoring.layout import ReadRow, row_positions
from specmoe_jax.kv_cache.positions import KV_PAGE, pages_of
from specmoe_jax.support.errors import PlanError


def share_prefixes(rows: Sequence[ReadRow], unscored: Sequence[int]) -> tuple[ReadRow, ...]:
    """The rows, told which row holds their beginning; behind them the rows of the beginnings.

    unscored: positions of each row's chain before the first whose prediction is asked for, which may lie in a shared page.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number].chain)
    common = [0] + [
        _common(rows[a].chain[: unscored[a]], rows[b].chain[: unscored[b]]) // KV_PAGE * KV_PAGE
        for a, b in itertools.pairwise(order)
    ]
    shared = list(rows)
    for start, end in _runs(common):
        length = min(common[start + 1 : end])
        for number in order[start:end]:
            shared[number] = rows[number]._replace(prefix=len(shared), shared=length)
        shared.append(ReadRow(chain=rows[order[start]].chain[:length]))
    return tuple(shared)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    width = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:width]) != np.asarray(b[:width]))
    return int(differ[0]) if len(differ) else width


def _runs(common: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours that share a beginning. common: of each with the one before it, the first 0.

    Where two have less than half in common of what either has with its other neighbour, a run ends: a few tokens of all tasks
    must not take the place of the examples of each.

    >>> list(_runs([0, 640, 640, 64, 640, 0, 0, 128]))
    [(0, 3), (3, 5), (6, 8)]
    """
    start = 0
    for place in range(1, len(common) + 1):
        beside = common[place - 1 : place] + common[place + 1 : place + 2]
        if place == len(common) or common[place] == 0 or 2 * common[place] < max(beside):
            if place - start > 1:
                yield start, place
            start = place


def batches(
    rows: Sequence[ReadRow], positions: int, num_pages: int, most: int | None = None
) -> Iterator[tuple[list[int], list[int], dict[int, np.ndarray]]]:
    """What an empty cache of so many pages holds at a time. -> beginnings and rows by number, and the pages [P] of each.

    positions: of the longest row. most: rows at a time, where pages are not all that they take. Rows of one beginning come one
    after the other, the longest first. Raises PlanError for a row that does not fit.
    """
    heads = {row.prefix for row in rows if row.prefix is not None}
    wanted = [number for number in range(len(rows)) if number not in heads]
    wanted.sort(key=lambda number: (-1 if rows[number].prefix is None else rows[number].prefix, -len(rows[number].chain)))
    tables: dict[int, np.ndarray] = {}
    used = 0

    def done():
        return [number for number in tables if number in heads], [number for number in tables if number not in heads], tables

    for number in wanted:
        row = rows[number]
        own, begun = pages_of(row_positions(row) - row.shared), row.shared // KV_PAGE
        if used + own + (begun if row.prefix not in tables else 0) > num_pages or len(tables) == most:
            if not tables:
                raise _too_long(row, num_pages)
            yield done()
            tables, used = {}, 0
            if own + begun > num_pages:
                raise _too_long(row, num_pages)
        if row.prefix is not None and row.prefix not in tables:
            tables[row.prefix] = _pages(used, begun, positions)
            used += begun
        tables[number] = _pages(used, own, positions, tables[row.prefix][:begun].tolist() if row.prefix is not None else [])
        used += own
    yield done()


def _too_long(row: ReadRow, num_pages: int) -> PlanError:
    needed = pages_of(row_positions(row))
    return PlanError(
        f"a text of {row_positions(row)} tokens needs {needed} pages and the KV cache has {num_pages}; give more host memory"
    )


def _pages(first: int, count: int, positions: int, before: Sequence[int] = ()) -> np.ndarray:
    """[P] int32: the pages before, then `count` from the first free one on, -1 beyond."""
    table = np.full(pages_of(positions), -1, np.int32)
    table[: len(before)] = before
    table[len(before) : len(before) + count] = np.arange(first, first + count)
    return table
