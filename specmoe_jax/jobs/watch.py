"""The progress of a running job: a bar, a metrics file, and the time of each request."""

import time
from collections.abc import Iterable

from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.state import StepInfo
from specmoe_jax.jobs import metrics_file as prometheus
from specmoe_jax.support.atomic_files import write_atomically
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.progress import bar
from specmoe_jax.support.timing import Stopwatch

METRICS_EVERY_S = 1.0


class JobWatch:
    """A context: `on_step` and `on_event` are called while it is entered.

    limits: new tokens that each request may get, for the time left. metrics_file: rewritten in full, at most each second
    and at the end (None: none). failed: requests that were refused before the job.
    failed: those, and the requests that ended in an error.
    timings: per finished request, in the order in which they finished: `id`, `first_token_s` and `total_s` since its
    prefill began, `new_tokens`.
    """

    def __init__(
        self, engine: Engine, limits: Iterable[int], *, progress: str = "none", metrics_file: str | None = None, failed: int = 0
    ):
        self._engine, self._path, self._watch = engine, metrics_file, Stopwatch()
        limits = list(limits)
        self._requests, self.failed, self._written_s = len(limits), failed, float("-inf")
        self._bar, self._tokens, self._mode = None, sum(limits), progress
        self._first_s: dict[int, float] = {}
        self.timings: list[dict] = []

    def __enter__(self) -> "JobWatch":
        self._write()
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        try:
            self._write()
        except RequestError:
            if kind is None:  # else the error that ended the job matters
                raise

    def on_step(self, info: StepInfo) -> None:
        """Moves the bar; rewrites the metrics file where it is old."""
        committed = int(info.committed.sum())
        if self._bar is None:  # before, a bar of nothing would stand still over compilation and prefill, which have their own
            self._bar = bar("decode", self._tokens, "tok", mode=self._mode)
        self._bar.set_postfix_str(f"{committed / max(int(info.active.sum()), 1):.2f} tokens/step", refresh=False)
        self._bar.update(committed)
        if time.perf_counter() - self._written_s >= METRICS_EVERY_S:
            self._write()

    def on_event(self, event: TokenEvent) -> None:
        """Notes the times of a request."""
        self._first_s.setdefault(event.id, event.elapsed_s)
        if event.completion is None:
            return
        if event.completion.finish_reason == "error":
            self.failed += 1
        self.timings.append(
            {
                "id": event.id,
                "first_token_s": self._first_s.pop(event.id),
                "total_s": event.elapsed_s,
                "new_tokens": len(event.completion.token_ids),
            }
        )

    def _write(self) -> None:
        if self._path is None:
            return
        figures = self._engine.stats() | {
            "wall_s": self._watch.seconds,
            "requests": self._requests,
            "requests_done": len(self.timings),
            "requests_failed": self.failed,
        }
        write_atomically(self._path, prometheus.text(figures))
        self._written_s = time.perf_counter()
