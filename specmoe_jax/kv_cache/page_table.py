"""Which pages of the host's KV cache belong to which row. Pure: a request gets its pages when it is admitted, and gives them back.

Host memory is thus sized by what the requests of a batch can fill, not by the longest of them times the rows.
"""

from typing import NamedTuple

import numpy as np

from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.support.errors import PlanError


class Pages(NamedTuple):
    """table: [B, P] int32, the pages of each row in order, -1 beyond them. free: [pages] bool."""

    table: np.ndarray
    free: np.ndarray


def no_pages(rows: int, longest: int, num_pages: int) -> Pages:
    """All pages free. longest: tokens of the longest row."""
    return Pages(table=np.full((rows, pages_of(longest)), -1, np.int32), free=np.ones(num_pages, bool))


def admit(pages: Pages, row: int, tokens: int) -> Pages | None:
    """With pages for `tokens` tokens reserved for a row that has none; None when there are not enough free ones."""
    if (pages.table[row] >= 0).any():
        raise PlanError(f"row {row} has pages: release it first")
    return grow(pages, row, tokens)


def grow(pages: Pages, row: int, tokens: int) -> Pages | None:
    """With as many further pages for a row as it needs to hold `tokens` tokens; None when there are not enough free ones."""
    wanted, has = pages_of(tokens), int((pages.table[row] >= 0).sum())
    if wanted > pages.table.shape[1]:
        raise PlanError(f"row {row} is given more than {pages.table.shape[1]} pages: plan for longer rows")
    if wanted <= has:
        return pages
    free = np.flatnonzero(pages.free)[: wanted - has]
    if wanted - has > len(free):
        return None
    table, left = pages.table.copy(), pages.free.copy()
    table[row, has:wanted] = free
    left[free] = False
    return Pages(table=table, free=left)


def release(pages: Pages, row: int) -> Pages:
    """With the pages of a row free again."""
    table, free = pages.table.copy(), pages.free.copy()
    free[table[row][table[row] >= 0]] = True
    table[row] = -1
    return Pages(table=table, free=free)
