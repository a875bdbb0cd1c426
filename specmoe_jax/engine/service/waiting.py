"""The requests that wait for a row: interactive ones first, the others where rows are left for those to come."""

import threading
from collections.abc import Iterable

from specmoe_jax.engine.service.handles import Handle
from specmoe_jax.support.errors import QueueFull

RESERVED = 8  # of so many rows one is kept free of background requests, where there are several


class WaitingList:
    """Any thread may add and take out; the service's thread asks which are due. most: interactive requests that may wait."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.RLock()  # re-entrant, since a signal handler may cancel
        self._handles: dict[int, Handle] = {}  # in the order of their arrival

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handles: Iterable[Handle], *, bounded: bool = True) -> None:
        """All of them or none. Raises QueueFull, unless not bounded."""
        handles = list(handles)
        with self._lock:
            coming = sum(not handle.background for handle in handles)
            if bounded and coming and self._count() + coming > self._most:
                raise QueueFull(f"{self._count()} requests wait and at most {self._most} may; try again later")
            self._handles |= {handle.id: handle for handle in handles}

    def take(self, request_id: int) -> Handle | None:
        """One that no longer waits; None where it did not."""
        with self._lock:
            return self._handles.pop(request_id, None)

    def take_all(self) -> list[Handle]:
        with self._lock:
            handles, self._handles = list(self._handles.values()), {}
        return handles

    def due(self, rows: int, background: int) -> list[Handle]:
        """In the order in which they may take rows. background: requests of that kind that have rows, of `rows`."""
        with self._lock:
            handles = list(self._handles.values())
        room = (rows if rows == 1 else rows - -(-rows // RESERVED)) - background
        return [h for h in handles if not h.background] + [h for h in handles if h.background][: max(room, 0)]

    def _count(self) -> int:
        return sum(not handle.background for handle in self._handles.values())
