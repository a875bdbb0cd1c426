"""The guard: how many tokens to draft next, so that speculation is never slower than none. Pure.

Utility is tokens gained per second spent (after Cascade, Saxena et al. 2025): with a per-token acceptance a, a step
of k drafted tokens commits (1 - a^(k+1)) / (1 - a) tokens per row (Leviathan et al. 2023, Eq. 1) and takes the
seconds that steps of that length were seen to take. The length with the largest utility is used; the others are
tried again at growing intervals, because acceptance and contexts change.
"""

from typing import NamedTuple

import numpy as np

MEMORY = 0.7  # weight of the past in the running means: a change shows after about three steps
FIRST_INTERVAL, LAST_INTERVAL = 16, 512  # steps between trials; each trial that changes nothing doubles it


class Guard(NamedTuple):
    """lengths: compiled draft lengths, ascending from 0. seconds: per length, running mean of a step, nan = unseen.

    accepted, refused: running sums of drafted tokens that stood, and of runs that ended before their end.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    accepted: float = 0.0
    refused: float = 0.0
    step: int = 0
    next_trial: int = FIRST_INTERVAL
    interval: int = FIRST_INTERVAL


def make_guard(longest: int) -> Guard:
    """Lengths 0, the powers of two below `longest`, and `longest`."""
    lengths = [0, *(1 << i for i in range(longest.bit_length()) if 1 << i < longest), longest]
    return Guard(lengths=tuple(lengths), seconds=(float("nan"),) * len(lengths))


def choose(guard: Guard) -> int:
    """The draft length of the next step: first the longest and 0 once each, then the best, trials in between."""
    if np.isnan(guard.seconds[-1]):
        return guard.lengths[-1]
    if np.isnan(guard.seconds[0]):
        return 0
    best = int(np.argmax(utilities(guard)))
    if guard.step < guard.next_trial:
        return guard.lengths[best]
    # A trial tells what is not known: the time without a draft while drafting, the acceptance while not.
    return 0 if best else guard.lengths[1]


def observe(guard: Guard, length: int, accepted: np.ndarray, seconds: float) -> Guard:
    """The guard after a step that drafted `length` tokens; accepted: [rows], drafted tokens that stood."""
    index = guard.lengths.index(length)
    old = guard.seconds[index]
    mean = seconds if np.isnan(old) else MEMORY * old + (1 - MEMORY) * seconds
    trial, step = guard.step >= guard.next_trial, guard.step + 1
    guard = guard._replace(seconds=(*guard.seconds[:index], mean, *guard.seconds[index + 1 :]), step=step)
    if length:
        guard = guard._replace(
            accepted=MEMORY * guard.accepted + float(accepted.sum()),
            refused=MEMORY * guard.refused + float((accepted < length).sum()),
        )
    if not trial:
        return guard
    interval = min(2 * guard.interval, LAST_INTERVAL)
    return guard._replace(interval=interval, next_trial=step + interval)


def acceptance(guard: Guard) -> float:
    """Probability that a drafted token stands, given that those before it did."""
    tried = guard.accepted + guard.refused
    return guard.accepted / tried if tried else 0.0


def utilities(guard: Guard) -> np.ndarray:
    """Tokens per row and second of each length; the seconds of an unseen one are interpolated between its neighbours."""
    lengths, seconds = np.array(guard.lengths, float), np.array(guard.seconds)
    seen = ~np.isnan(seconds)
    expected_s = np.where(seen, seconds, np.interp(lengths, lengths[seen], seconds[seen]))
    rate = acceptance(guard)
    tokens = lengths + 1 if rate >= 1 else (1 - rate ** (lengths + 1)) / (1 - rate)
    return tokens / expected_s
