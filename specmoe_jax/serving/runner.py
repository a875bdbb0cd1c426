"""The thread in which the engine decodes, and what a caller in an event loop gets of it."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.service.handles import Handle
from specmoe_jax.engine.service.service import Service
from specmoe_jax.serving.metrics import ServerFigures
from specmoe_jax.support.errors import QueueFull

_LOG = logging.getLogger(__name__)
FAILURES = 3  # steps in a row after which a server says that it is broken
PAUSE_S = 0.5  # after a step that failed


class Answering:
    """One request of a client. events: as the steps give them, for the event loop alone; the last one has a completion."""

    def __init__(self, loop: asyncio.AbstractEventLoop, figures: ServerFigures):
        self.events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self.handle: Handle | None = None
        self._loop, self._figures, self._begun_s, self._last_s = loop, figures, time.perf_counter(), None

    def on_event(self, event: TokenEvent) -> None:
        """In the engine's thread."""
        now_s = time.perf_counter()
        if event.token_ids:
            self._figures.add_tokens(now_s - (self._last_s or self._begun_s), first=self._last_s is None)
            self._last_s = now_s
        if event.completion is not None:
            self._figures.add_completion(event.completion, now_s - self._begun_s)
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has been closed, so nobody reads any more
            pass

    def cancel(self) -> None:
        if self.handle is not None and not self.handle.done:
            self.handle.cancel()


class Runner:
    """Steps a service in a thread of its own while there are requests. figures: of the requests."""

    def __init__(self, service: Service, figures: ServerFigures):
        self.service, self.figures = service, figures
        self.broken: str | None = None
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="specmoe-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; what runs is cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self.service.close()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def submit(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, sampling_ids: Sequence[int], loop
    ) -> list[Answering]:
        """All or none. Raises RequestError or QueueFull."""
        answers = [Answering(loop, self.figures) for _ in prompts]
        try:
            handles = self.service.submit_all(prompts, params, sampling_ids, on_events=[answer.on_event for answer in answers])
        except QueueFull:
            self.figures.rejected += len(prompts)
            raise
        for answer, handle in zip(answers, handles, strict=True):
            answer.handle = handle
        self.wake()
        return answers

    def retry_after_s(self) -> int:
        """When a row is likely to be free for one more request: by the mean time of those that have ended."""
        waiting, rows = self.service.running.waiting, self.service.rows
        return max(1, min(60, round(self.figures.mean_request_s * (waiting + 1) / rows)))

    def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                busy, failures = self.service.step(), 0
            except Exception as e:  # what had rows was told; the others go on with a new state
                _LOG.exception("a step failed")
                failures, busy = failures + 1, True
                self.broken = f"{type(e).__name__}: {e}" if failures >= FAILURES else None
                time.sleep(PAUSE_S)
            else:
                self.broken = None
            if not busy:
                self._wake.wait()
                self._wake.clear()
