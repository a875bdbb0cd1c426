"""The guard: how many tokens to draft next, so that speculation is never slower than none. Pure.

Utility is tokens gained per second spent (after Cascade, Saxena et al. 2025): with a per-token acceptance a, a step
of k drafted tokens commits (1 - a^(k+1)) / (1 - a) tokens per row (Leviathan et al. 2023, Eq. 1) and takes the
seconds that steps of that length were seen to take. The length with the largest utility is used; the others are
tried again at growing intervals, because acceptance and contexts change, and because a length is slow when it is first
used: its experts are not there yet.

Scalars, not arrays: this runs in every step, and of a step of 3 ms ten small numpy calls are a percent.
"""

import math
from typing import NamedTuple

import numpy as np

MEMORY = 0.7  # weight of the past in the running means: a change shows after about three steps
HICCUP = 2.0  # a step counts at most so many times the mean: one that something else delayed must not stop the drafting
STALE = 4  # steps after which the time of a length is forgotten when it is seen again
FIRST_INTERVAL, LAST_INTERVAL = 8, 512  # steps between trials; each trial that changes nothing doubles it
BUDGET = 0.01  # of the time so far: what trials may have lost before the next one; the last of them may go beyond
CHEAP = 0.05  # what drafting a token costs at least, of a step without a draft: so a trial hopes
PROMISING = 1.2  # tokens per row and step without a draft, if drafts were that cheap: such a trial gets a second step


class Guard(NamedTuple):
    """lengths: compiled draft lengths, ascending from 0. seconds: per length, running mean of a step, nan = unseen.

    seen: per length, steps in a row that made its mean. last: per length, the step that saw it last. accepted, refused:
    running sums of drafted tokens that stood, and of runs that ended before their end. trials: so far. trying: the length
    that a trial goes on with, else None. elapsed_s, lost_s: of all steps, and what trials took beyond the time in which the
    best length would have made the same tokens (the first two steps aside).
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    seen: tuple[int, ...]
    last: tuple[int, ...]
    accepted: float = 0.0
    refused: float = 0.0
    step: int = 0
    elapsed_s: float = 0.0
    lost_s: float = 0.0
    next_trial: int = FIRST_INTERVAL
    interval: int = FIRST_INTERVAL
    trials: int = 0
    trying: int | None = None


def make_guard(longest: int) -> Guard:
    """Lengths 0, the powers of two below `longest`, and `longest`."""
    lengths = [0, *(1 << i for i in range(longest.bit_length()) if 1 << i < longest), longest]
    zeros = (0,) * len(lengths)
    return Guard(lengths=tuple(lengths), seconds=(float("nan"),) * len(lengths), seen=zeros, last=zeros)


def choose(guard: Guard) -> int:
    """The draft length of the next step: first the longest and 0 once each, then the best, trials in between."""
    if math.isnan(guard.seconds[-1]):
        return guard.lengths[-1]
    if math.isnan(guard.seconds[0]):
        return 0
    if guard.trying is not None:
        return guard.trying
    best = best_length(guard)
    if not _trial_is_due(guard):
        return best
    # A trial tells what is not known: the time without a draft or with a longer one while drafting, that of any while not.
    hopeful = _hopeful_length(guard)
    return 0 if best and (guard.trials % 2 == 0 or hopeful == best) else hopeful


def resting(guard: Guard, length: int) -> bool:
    """Whether a step of that length is one of plain decoding, or a trial out of it.

    What stays on the accelerator is then better chosen by all passes than by this one of a token a row.
    """
    return length == 0 or (not math.isnan(guard.seconds[0]) and best_length(guard) == 0)


def observe(guard: Guard, length: int, accepted: np.ndarray, seconds: float) -> Guard:
    """The guard after a step that drafted `length` tokens; accepted: [rows], drafted tokens that stood."""
    index, step = guard.lengths.index(length), guard.step + 1
    known = not (math.isnan(guard.seconds[0]) or math.isnan(guard.seconds[-1]))
    before, trial = best_length(guard) if known else None, known and guard.trying is None and _trial_is_due(guard)
    if trial or guard.trying is not None:
        expected_s = (1 + float(np.mean(accepted)) if len(accepted) else 1) / max(utilities(guard))
        guard = guard._replace(lost_s=guard.lost_s + max(min(seconds, HICCUP * _seconds(guard, index)) - expected_s, 0.0))
    seen = 0 if step - guard.last[index] > STALE else guard.seen[index]
    old = guard.seconds[index]
    # The first step of a length after others is slow, so the second one takes its place.
    mean = seconds if seen < 2 else MEMORY * old + (1 - MEMORY) * min(seconds, HICCUP * old)
    guard = guard._replace(
        seconds=_changed(guard.seconds, index, mean),
        seen=_changed(guard.seen, index, seen + 1),
        last=_changed(guard.last, index, step),
        step=step,
        elapsed_s=guard.elapsed_s + seconds,
    )
    if length:
        guard = guard._replace(
            accepted=MEMORY * guard.accepted + float(accepted.sum()),
            refused=MEMORY * guard.refused + float((accepted < length).sum()),
        )
    if before is None:
        return guard
    if trial and length and seen == 0 and _hope(guard, length) > PROMISING:
        return guard._replace(trying=length)
    ended = trial or guard.trying is not None
    guard = guard._replace(trying=None, trials=guard.trials + ended)
    if best_length(guard) != before:
        return guard._replace(interval=FIRST_INTERVAL, next_trial=step + FIRST_INTERVAL)
    if not ended:
        return guard
    interval = min(2 * guard.interval, LAST_INTERVAL)
    return guard._replace(interval=interval, next_trial=step + interval)


def acceptance(guard: Guard) -> float:
    """Probability that a drafted token stands, given that those before it did."""
    tried = guard.accepted + guard.refused
    return guard.accepted / tried if tried else 0.0


def best_length(guard: Guard) -> int:
    """The length with the largest utility."""
    found = utilities(guard)
    return guard.lengths[found.index(max(found))]


def utilities(guard: Guard) -> tuple[float, ...]:
    """Tokens per row and second of each length; the seconds of an unseen one are interpolated between its neighbours."""
    rate = acceptance(guard)
    return tuple(_tokens(rate, n) / _seconds(guard, i) for i, n in enumerate(guard.lengths))


def _seconds(guard: Guard, index: int) -> float:
    if not math.isnan(guard.seconds[index]):
        return guard.seconds[index]
    seen = [i for i, seconds in enumerate(guard.seconds) if not math.isnan(seconds)]
    below, above = max((i for i in seen if i < index), default=seen[0]), min((i for i in seen if i > index), default=seen[-1])
    if below == above:
        return guard.seconds[below]
    share = (guard.lengths[index] - guard.lengths[below]) / (guard.lengths[above] - guard.lengths[below])
    return guard.seconds[below] + share * (guard.seconds[above] - guard.seconds[below])


def _tokens(rate: float, length: int) -> float:
    """Expected tokens per row of a step of that length."""
    return length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)


def _hope(guard: Guard, length: int) -> float:
    """Tokens per row and step without a draft of that length, if drafting were nearly free."""
    return _tokens(acceptance(guard), length) / (1 + CHEAP * length)


def _hopeful_length(guard: Guard) -> int:
    """The best length above 0 if drafting were nearly free: the longer, the more is accepted."""
    return max(guard.lengths[1:], key=lambda length: _hope(guard, length))


def _trial_is_due(guard: Guard) -> bool:
    return guard.step >= guard.next_trial and guard.lost_s <= BUDGET * guard.elapsed_s


def _changed(values: tuple, index: int, value) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
