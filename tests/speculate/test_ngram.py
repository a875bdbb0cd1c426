"""Prompt lookup in integers."""

import pytest

from specmoe_jax.speculate.drafts.ngram import lookup


@pytest.mark.parametrize(
    ("history", "length", "expected"),
    [
        ((1, 2, 3, 4, 1, 2, 3), 2, [4, 1]),  # the longest suffix wins
        ((7, 2, 5, 9, 2, 6, 2), 1, [6]),  # the latest occurrence wins
        ((1, 2, 1, 2), 4, [1, 2, 1, 2]),  # too near the end: its continuation is repeated
        ((3, 4, 5), 2, [5, 5]),  # no match: the last token
        ((8,), 2, [8, 8]),
        ((), 3, [0, 0, 0]),  # a padding row
    ],
)
def test_lookup(history, length, expected):
    assert lookup(history, length, 3) == expected
