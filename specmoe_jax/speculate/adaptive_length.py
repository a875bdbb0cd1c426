"""Adaptive draft length (`guard`): how many tokens to draft next, so that speculation is never slower than none. Pure.

Utility is tokens gained per second spent (after Cascade, Saxena et al. 2025): with a per-token acceptance a, a step
of k drafted tokens commits (1 - a^(k+1)) / (1 - a) tokens per row (Leviathan et al. 2023, Eq. 1) and takes the
measured seconds of steps of that length. The length with the largest utility is used; the others are
tried again at growing intervals, because acceptance and contexts change. A length is slow when it is first used, because
its experts are not resident yet: such steps count only until there are others.

Scalars, not arrays: this runs in every step, and of a step of 3 ms ten small numpy calls are a percent.
"""

import math
from typing import NamedTuple

import numpy as np

MEMORY = 0.7  # weight of the past in the running means at least: a change shows after about three steps
ROW_MEMORY = 0.97  # ... per row that a step observed: few rows are noisy, so their past weighs more
SECONDS_MEMORY = 0.9  # of the seconds at most
HICCUP = 2.0  # a step counts at most so many times the mean: one delayed step must not stop the drafting
STALE = 4  # steps after which a length is cold again: its experts have been evicted
MARGIN = 1.05  # times plain decoding's utility: the least that drafting must promise
PLAIN_TRIAL = 4  # steps of a trial without a draft: they cost nothing if that is better, and one alone is too noisy
COLD = (2, 1)  # steps that a cold length takes to warm up: without a draft (whose experts other steps chose), with one
FIRST_INTERVAL, LAST_INTERVAL = 8, 512  # steps between trials; each trial that changes nothing doubles it
BUDGET = 0.01  # of the time so far: the most that trials may have lost before the next one; the last of them may exceed it
CHEAP = 0.05  # optimistic cost of drafting a token, as a share of a step without a draft; used to choose trials
PROMISING = 1.2  # tokens per row and step without a draft, if drafts were that cheap: such a trial gets a second step


class AdaptiveLength(NamedTuple):
    """lengths: compiled draft lengths, ascending from 0. seconds: per length, running mean of a step, nan = unseen.

    warm: per length, whether its mean is of warm steps. seen: per length, steps in a row. last: per length, the step that saw
    it last. accepted, refused: running sums of drafted tokens that were accepted, and of rejected runs. trials: so far.
    trying: the length of the trial that is under way, else None. elapsed_s, lost_s: of all steps, and the excess of trials over
    the time that the best length would have taken for the same tokens (the first steps aside).
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    warm: tuple[bool, ...]
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


def compiled_lengths(longest: int) -> tuple[int, ...]:
    """0, the powers of two below `longest`, and `longest`: what a draft that changes its length is compiled for."""
    return (0, *(1 << i for i in range(longest.bit_length()) if 1 << i < longest), longest)


def make_adaptive_length(longest: int) -> AdaptiveLength:
    """Before the first step."""
    lengths = compiled_lengths(longest)
    zeros = (0,) * len(lengths)
    return AdaptiveLength(
        lengths=lengths, seconds=(float("nan"),) * len(lengths), warm=(False,) * len(lengths), seen=zeros, last=zeros
    )


def choose(adaptive: AdaptiveLength) -> int:
    """The draft length of the next step: first the longest once and 0 until it is warm, then the best, trials in between."""
    if math.isnan(adaptive.seconds[-1]):
        return adaptive.lengths[-1]
    if not adaptive.warm[0]:
        return 0
    if adaptive.trying is not None:
        return adaptive.trying
    best = best_length(adaptive)
    if not _trial_is_due(adaptive):
        return best
    # A trial measures what is unknown: while drafting, the time without a draft or with a longer one; otherwise that of any.
    hopeful = _hopeful_length(adaptive)
    return 0 if best and (adaptive.trials % 2 == 0 or hopeful == best) else hopeful


def resting(adaptive: AdaptiveLength, length: int) -> bool:
    """Whether a step of that length is one of plain decoding, or a trial out of it.

    The resident experts are then better chosen by all passes than by this one with a single token per row.
    """
    return length == 0 or (not math.isnan(adaptive.seconds[0]) and best_length(adaptive) == 0)


def observe(adaptive: AdaptiveLength, length: int, accepted: np.ndarray, seconds: float) -> AdaptiveLength:
    """The estimates after a step that drafted `length` tokens; accepted: [rows], drafted tokens that were accepted."""
    index, step = adaptive.lengths.index(length), adaptive.step + 1
    known = not (math.isnan(adaptive.seconds[0]) or math.isnan(adaptive.seconds[-1]))
    before, trial = best_length(adaptive) if known else None, known and adaptive.trying is None and _trial_is_due(adaptive)
    if trial or adaptive.trying is not None:
        expected_s = (1 + float(np.mean(accepted)) if len(accepted) else 1) / max(utilities(adaptive))
        adaptive = adaptive._replace(
            lost_s=adaptive.lost_s + max(min(seconds, HICCUP * _seconds(adaptive, index)) - expected_s, 0.0)
        )
    seen = 0 if step - adaptive.last[index] > STALE else adaptive.seen[index]
    cold, keep = seen < COLD[length > 0], max(MEMORY, ROW_MEMORY ** max(len(accepted), 1))
    adaptive = adaptive._replace(
        seconds=_changed(adaptive.seconds, index, _mean(adaptive, index, seconds, cold, min(keep, SECONDS_MEMORY))),
        warm=_changed(adaptive.warm, index, adaptive.warm[index] or not cold),
        seen=_changed(adaptive.seen, index, seen + 1),
        last=_changed(adaptive.last, index, step),
        step=step,
        elapsed_s=adaptive.elapsed_s + seconds,
    )
    if length:
        adaptive = adaptive._replace(
            accepted=keep * adaptive.accepted + float(accepted.sum()),
            refused=keep * adaptive.refused + float((accepted < length).sum()),
        )
    if before is None:
        return adaptive
    ended = trial or adaptive.trying is not None
    if ended and (seen < PLAIN_TRIAL - 1 if length == 0 else cold and _optimistic(adaptive, length) > PROMISING):
        return adaptive._replace(trying=length)
    adaptive = adaptive._replace(trying=None, trials=adaptive.trials + ended)
    if best_length(adaptive) != before:
        return adaptive._replace(interval=FIRST_INTERVAL, next_trial=step + FIRST_INTERVAL)
    if not ended:
        return adaptive
    interval = min(2 * adaptive.interval, LAST_INTERVAL)
    return adaptive._replace(interval=interval, next_trial=step + interval)


def _mean(adaptive: AdaptiveLength, index: int, seconds: float, cold: bool, keep: float) -> float:
    """Of the steps of a length: of warm ones as soon as there is one."""
    old = adaptive.seconds[index]
    if not adaptive.warm[index]:
        return seconds
    return old if cold else keep * old + (1 - keep) * min(seconds, HICCUP * old)


def acceptance(adaptive: AdaptiveLength) -> float:
    """Probability that a drafted token is accepted, given that those before it were."""
    tried = adaptive.accepted + adaptive.refused
    return adaptive.accepted / tried if tried else 0.0


def best_length(adaptive: AdaptiveLength) -> int:
    """The length with the largest utility; 0 where drafting does not clearly pay, because estimates err and changes cost bytes."""
    plain, *drafted = utilities(adaptive)
    best = max(drafted)
    return adaptive.lengths[1 + drafted.index(best)] if best > MARGIN * plain else 0


def utilities(adaptive: AdaptiveLength) -> tuple[float, ...]:
    """Tokens per row and second of each length; the seconds of an unseen one are interpolated between its neighbours."""
    rate = acceptance(adaptive)
    return tuple(_tokens(rate, n) / _seconds(adaptive, i) for i, n in enumerate(adaptive.lengths))


def _seconds(adaptive: AdaptiveLength, index: int) -> float:
    if not math.isnan(adaptive.seconds[index]):
        return adaptive.seconds[index]
    seen = [i for i, seconds in enumerate(adaptive.seconds) if not math.isnan(seconds)]
    below, above = max((i for i in seen if i < index), default=seen[0]), min((i for i in seen if i > index), default=seen[-1])
    if below == above:
        return adaptive.seconds[below]
    share = (adaptive.lengths[index] - adaptive.lengths[below]) / (adaptive.lengths[above] - adaptive.lengths[below])
    return adaptive.seconds[below] + share * (adaptive.seconds[above] - adaptive.seconds[below])


def _tokens(rate: float, length: int) -> float:
    """Expected tokens per row of a step of that length."""
    return length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)


def _optimistic(adaptive: AdaptiveLength, length: int) -> float:
    """Tokens per row and step without a draft of that length, if drafting were nearly free."""
    return _tokens(acceptance(adaptive), length) / (1 + CHEAP * length)


def _hopeful_length(adaptive: AdaptiveLength) -> int:
    """The best length above 0 if drafting were nearly free: the longer, the more is accepted."""
    return max(adaptive.lengths[1:], key=lambda length: _optimistic(adaptive, length))


def _trial_is_due(adaptive: AdaptiveLength) -> bool:
    return adaptive.step >= adaptive.next_trial and adaptive.lost_s <= BUDGET * adaptive.elapsed_s


def _changed(values: tuple, index: int, value) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
