"""Meters: wall seconds, and what JAX compiles meanwhile in this process."""

import functools
import time

import jax


class _Compilations:
    """Of the process. JAX keeps a listener for ever, so there is one."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == self._EVENT:
            self.count += 1
            self.seconds += duration_secs


_compilations = functools.cache(_Compilations)


class CompileCounter:
    """Counts XLA compilations and their time in this process since it was made."""

    def __init__(self):
        self._all = _compilations()
        self._count, self._seconds = self._all.count, self._all.seconds

    @property
    def count(self) -> int:
        return self._all.count - self._count

    @property
    def seconds(self) -> float:
        return self._all.seconds - self._seconds


class Stopwatch:
    """Wall seconds since it was made."""

    def __init__(self):
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


class Laps:
    """Consecutive intervals by name; each begins where the one before it ended. seconds: of each so far."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> tuple[float, float]:
        """Ends an interval. -> its start and end in seconds of time.perf_counter."""
        start_s, self._last_s = self._last_s, time.perf_counter()
        self.seconds[name] = self._last_s - start_s
        return start_s, self._last_s
