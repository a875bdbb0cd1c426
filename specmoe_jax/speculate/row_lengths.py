"""How many drafted tokens of each row are worth the experts that they bring (`draft_stop`). Pure.

A pass that verifies one token more of a row may need experts that no other token of the batch needs and that are not on the
accelerator. Its draft ran the target's gates, so they are known before the pass, but for those of the last drafted token. The
token is verified where the tokens that it is expected to add, per expert that it brings, are at least those that the step earns
on average (EVICT and EcoSpec prune trees by such a rule). An expert that several tokens of the rest of the draft want is shared
evenly among them.

Only counters decide, no clock, so that a run can be repeated. What is decided of a token depends on the token itself (its gates),
so it is of use only where acceptance is equality with the target's choice: greedy rows, and deterministic sampling.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

FADE = 0.98  # of what earlier steps count for: tens of steps, so that a change of the text shows
PRIOR = 0.8  # acceptance before anything was seen: unseen lengths are tried
PRIOR_WEIGHT = 2.0  # how many tokens it counts for
ROW_WEIGHT = 4.0  # tokens of the whole batch that a row's own record of a position is mixed with
PASS_TOKENS = 3.0  # what a pass costs beside its copies, in all choices of so many tokens; less ends rows too soon
ROUNDS = 3  # of leaving out rows at one position: those that stay then share their experts with fewer


class RowStops(NamedTuple):
    """The record, fading from step to step. tried, accepted: [N], drafted tokens by position: verified, and accepted of them.

    row_tried, row_accepted: [B, N], of each row's own request. ids: [B], the requests of the rows.
    """

    tried: np.ndarray
    accepted: np.ndarray
    row_tried: np.ndarray
    row_accepted: np.ndarray
    ids: np.ndarray


class DraftStop(Protocol):
    """Ends the drafts of the rows of a batch."""

    def begin(self, rows: int, length: int) -> Any:
        """The record before the first step of a batch of so many rows and drafted tokens."""
        ...

    def lengths(self, record: Any, choices: np.ndarray, active: np.ndarray, held: np.ndarray) -> np.ndarray:
        """[B] int32, drafted tokens to verify of each row; 0 for rows that are not active [B].

        choices: [N, L, B, A] int32, what the gates chose at the last committed token and at each drafted one but the last, -1 for
        padding. held: [L, E] bool, experts on the accelerator.
        """
        ...

    def observe(self, record: Any, lengths: np.ndarray, accepted: np.ndarray, active: np.ndarray, ids: np.ndarray) -> Any:
        """The record after a step that verified `lengths` and accepted `accepted` drafted tokens. ids: [B], of the requests."""
        ...


class UnionStop:
    """By what each token adds to the union of experts."""

    def begin(self, rows: int, length: int) -> RowStops:
        places, of_rows = np.zeros(length), np.zeros((rows, length))
        return RowStops(places, places, of_rows, of_rows, np.full(rows, -1))

    def lengths(self, record: RowStops, choices: np.ndarray, active: np.ndarray, held: np.ndarray) -> np.ndarray:
        longest, known, gains = len(choices), held.copy(), np.cumprod(chances(record), axis=1)
        lengths, goes_on = np.zeros(len(active), np.int32), active.copy()
        share, earned = _shares(choices, goes_on, known), float(active.sum())
        cost = PASS_TOKENS * choices.shape[1] * choices.shape[3] + _need(choices[0], goes_on, known)
        for position in range(longest):
            gain, seen = gains[:, position], position + 1 < longest
            for _ in range(ROUNDS):
                share = _shares(choices[position + 1 :], goes_on, known) if seen else np.where(goes_on, share, 0.0)
                leave = goes_on & (gain * cost < earned * share)
                if not leave.any():
                    break
                goes_on = goes_on & ~leave
            if not goes_on.any():
                break
            lengths[goes_on] += 1
            earned += gain[goes_on].sum()
            cost += _need(choices[position + 1], goes_on, known) if seen else share[goes_on].sum()
        return lengths

    def observe(self, record: RowStops, lengths: np.ndarray, accepted: np.ndarray, active: np.ndarray, ids: np.ndarray) -> RowStops:
        places, same = np.arange(len(record.tried)), (record.ids == ids)[:, None]
        reached = active[:, None] & (lengths[:, None] > places) & (accepted[:, None] >= places)
        stood = reached & (accepted[:, None] > places)
        return RowStops(
            FADE * record.tried + reached.sum(axis=0),
            FADE * record.accepted + stood.sum(axis=0),
            FADE * record.row_tried * same + reached,
            FADE * record.row_accepted * same + stood,
            ids.copy(),
        )


def chances(record: RowStops) -> np.ndarray:
    """[B, N], probability that a row's drafted token is accepted if those before it are."""
    by_place = (record.accepted + PRIOR * PRIOR_WEIGHT) / (record.tried + PRIOR_WEIGHT)
    return (record.row_accepted + ROW_WEIGHT * by_place) / (record.row_tried + ROW_WEIGHT)


def _shares(choices: np.ndarray, rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[B], experts that the first of some positions [P, L, B, A] brings for each of some rows [B] bool.

    One that several choices of these rows and positions want is divided among them.
    """
    layers, experts = known.shape
    of_layer = experts * np.arange(layers)[:, None, None]
    taken = np.where((choices >= 0) & rows[:, None], choices + of_layer, layers * experts)  # the last is nobody's
    wanted = np.bincount(taken.ravel(), minlength=layers * experts + 1)[:-1]
    each = np.append(np.where(known.ravel(), 0.0, 1.0 / np.maximum(wanted, 1)), 0.0)
    return each[taken[0]].sum(axis=(0, 2))


def _need(ids: np.ndarray, rows: np.ndarray, known: np.ndarray) -> int:
    """Marks in `known` what a position [L, B, A] of some rows needs. -> how many experts that brings."""
    before = known.sum()
    for layer, chosen in enumerate(ids[:, rows]):
        known[layer, chosen[chosen >= 0]] = True
    return int(known.sum() - before)


UNION = UnionStop()
