"""Which rows' draft cache lies on the accelerator and which in host memory (SpecMoEOff 4, memory-conscious draft execution). Pure.

Accelerator memory first; the overflow moves to the CPU row by row, the longest first, which takes the fewest moves. Moving back has
hysteresis, so that nothing oscillates: a request returns once at most, only in a step in which another one has ended, and only if
every row then on the accelerator has room to grow to its end. So it moves three times at most.

Deviation: the paper splits the batch for the whole draft model. Here the parts share the head's dense products, whose weights are
read once, and are apart in the attention alone, which then runs on both sides at once.
"""

from typing import NamedTuple

import numpy as np


class DraftSplit(NamedTuple):
    """requests: [B] int64, the request of each row, -1 for none. on_cpu: [B] bool. returned: [B] bool, has come back once."""

    requests: np.ndarray
    on_cpu: np.ndarray
    returned: np.ndarray


class Replaced(NamedTuple):
    """split: from now on. out, back: rows whose cache has to move to the host or back, in this order."""

    split: DraftSplit
    out: tuple[int, ...]
    back: tuple[int, ...]


def no_split(rows: int) -> DraftSplit:
    """Of rows without a request yet."""
    return DraftSplit(requests=np.full(rows, -1, np.int64), on_cpu=np.zeros(rows, bool), returned=np.zeros(rows, bool))


def plan_draft_split(split: DraftSplit, requests: np.ndarray, pages: np.ndarray, most: np.ndarray, capacity: int) -> Replaced:
    """Where each row is in the next step.

    requests: [B] int64, the request of each row now, -1 for none. pages: [B], what the step can fill of each; most: [B], what its
    request can ever fill, at least that. capacity: pages of the accelerator, which the rows there never exceed.
    """
    held, same = requests >= 0, requests == split.requests
    on_cpu, returned = split.on_cpu & held & same, split.returned & held & same
    out, back = [], []
    here = held & same & ~on_cpu
    while pages[here].sum() > capacity:
        row = int(np.argmax(np.where(here, pages, -1)))
        here[row], on_cpu[row] = False, True
        out.append(row)
    for row in np.flatnonzero(held & ~same):  # those that join
        here[row] = pages[here].sum() + pages[row] <= capacity
        on_cpu[row] = not here[row]
    if (~same & (split.requests >= 0)).any() and not out:
        waiting = np.flatnonzero(on_cpu & same & ~returned)
        for row in waiting[np.argsort(most[waiting], kind="stable")].tolist():
            if most[here].sum() + most[row] <= capacity:
                here[row], on_cpu[row], returned[row] = True, False, True
                back.append(row)
    return Replaced(DraftSplit(requests=requests.copy(), on_cpu=on_cpu, returned=returned), tuple(out), tuple(back))
