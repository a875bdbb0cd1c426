"""The status of a row of the batch."""

import enum
from typing import NamedTuple


class Phase(enum.Enum):
    """EMPTY: the row pads the batch. PREFILLING: the next pass processes its prompt. DECODING: it gets tokens at every step."""

    EMPTY = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()
    FINISHED = enum.auto()


class Status(NamedTuple):
    """reason: of a finished request, as in Completion.finish_reason; else None."""

    phase: Phase
    reason: str | None = None


EMPTY, PREFILLING, DECODING = Status(Phase.EMPTY), Status(Phase.PREFILLING), Status(Phase.DECODING)


def finished(reason: str) -> Status:
    return Status(Phase.FINISHED, reason)
