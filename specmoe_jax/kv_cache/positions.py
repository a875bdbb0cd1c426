"""In which pieces positions are held and computed: pages of the host's cache, micro-batches of a prefill."""

from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

PREFILL_TOKENS = (
    512  # of one micro-batch of a streamed prefill: enough to use an accelerator, few enough to keep others waiting briefly
)
CHUNKS_AHEAD = 3  # chunks of prompts whose activations are alive at a time: dispatch runs ahead (tests/engine/measure_memory.py)
KV_PAGE = 64  # tokens of a page of the host's paged cache: whole blocks of the packed layout, half of one wasted per request


def pages_of(tokens: Count) -> Count:
    """Pages that so many tokens take."""
    return -(-tokens // KV_PAGE)


def prefill_rows(rows: int, chunk: int) -> int:
    """Rows of one micro-batch of a streamed prefill in chunks of so many positions."""
    return max(1, min(rows, PREFILL_TOKENS // chunk))


def staged_positions(positions: int, chunk: int) -> int:
    """Whole chunks that hold `positions`."""
    return -(-positions // chunk) * chunk
