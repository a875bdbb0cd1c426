"""A submitted request as its caller sees it."""

import collections
from collections.abc import Callable, Iterator
from typing import Protocol

from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.state import Request


class Stepping(Protocol):
    """What a handle asks of its service."""

    def step(self) -> bool: ...

    def cancel(self, handle: "Handle") -> None: ...


class Handle:
    """Iterate it for the tokens of each step, or ask for the `result`; both run the service as far as they need.

    request: what was submitted. background: whether others go before it. completion: once it has ended.
    """

    def __init__(self, service: Stepping, request: Request, on_event: Callable[[TokenEvent], None] | None, *, background: bool):
        self.request, self.background, self.completion = request, background, None
        self._service, self._on_event = service, on_event
        self._events: collections.deque[TokenEvent] = collections.deque()

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def done(self) -> bool:
        return self.completion is not None

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self.done and not self._events:
                return
            self._service.step()

    def result(self) -> Completion:
        """The completion; waits for it. finish_reason is "cancelled" or "error" where it did not come to its end."""
        while self.completion is None:
            self._service.step()
        return self.completion

    def cancel(self) -> None:
        """Ends it; its row is free at the next step. Nothing happens where it has ended."""
        self._service.cancel(self)

    def deliver(self, event: TokenEvent) -> None:
        """For the service alone."""
        if self._on_event is None:
            self._events.append(event)
        if event.completion is not None:
            self.completion: Completion | None = event.completion
        if self._on_event is not None:
            self._on_event(event)
