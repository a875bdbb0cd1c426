"""Prompt lookup: the draft is what followed the last tokens when they occurred before. No model, no expert."""

from typing import NamedTuple

import numpy as np

from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.types import KVCache, Proposal


class NgramDraft(NamedTuple):
    """Looks the last `longest` .. 1 tokens up in the row's own history and proposes what came after (Saxena 2023).

    Every token it proposes is a point mass, so acceptance treats it as deterministic.
    """

    longest: int = 3

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        tokens = [lookup(history, view.length, self.longest) for history in view.history]
        return Proposal(tokens=np.array(tokens, np.int32).reshape(-1, view.length), probs=None), view.kv


def lookup(history: tuple[int, ...], length: int, longest: int) -> list[int]:
    """`length` tokens that continue `history`: after the latest earlier occurrence of its longest matching suffix.

    Where the occurrence is too near the end its continuation is repeated; without any match the last token is.

    >>> lookup((1, 2, 3, 4, 1, 2), length=2, longest=3)
    [3, 4]
    >>> lookup((1, 2, 3), length=2, longest=3)
    [3, 3]
    """
    if not history:
        return [0] * length
    text = np.asarray(history)
    for size in range(min(longest, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        found = np.flatnonzero((windows == text[-size:]).all(axis=1))
        if len(found):
            following = text[found[-1] + size :]
            return np.resize(following, length).tolist()
    return [int(text[-1])] * length
