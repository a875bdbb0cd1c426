"""What a server counts of its requests, in the text format of Prometheus."""

import bisect
import threading
from collections.abc import Mapping

from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.jobs import metrics_file

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Seconds, in buckets. One thread adds."""

    def __init__(self):
        self.counts, self.sum_s = [0] * (len(BUCKETS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def lines(self, name: str) -> list[str]:
        below, lines = 0, [f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.sum_s!r}", f"{name}_count {below}"]


class ServerFigures:
    """rejected: requests that found the queue full. The engine's thread adds to the others."""

    def __init__(self):
        self.rejected = 0
        self.ended = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.prompt_tokens = 0
        self.mean_request_s = 1.0
        self._first, self._between, self._whole = Histogram(), Histogram(), Histogram()
        self._lock = threading.Lock()

    def add_tokens(self, seconds: float, *, first: bool) -> None:
        """seconds: since the request came, of its first tokens; else since those before."""
        (self._first if first else self._between).add(seconds)

    def add_completion(self, completion: Completion, seconds: float) -> None:
        with self._lock:
            self.ended[completion.finish_reason] = self.ended.get(completion.finish_reason, 0) + 1
            self.prompt_tokens += completion.num_prompt_tokens
            if completion.finish_reason in ("stop", "length"):
                self._whole.add(seconds)
                self.mean_request_s = 0.9 * self.mean_request_s + 0.1 * seconds

    def text(self, engine_figures: Mapping, *, running: int, waiting: int) -> str:
        """Beside the engine's own figures."""
        prefix = metrics_file.PREFIX
        lines = [f"# TYPE {prefix}requests_total counter"]
        lines += [f'{prefix}requests_total{{finish_reason="{reason}"}} {count}' for reason, count in self.ended.items()]
        for name, kind, value in (
            ("requests_rejected_total", "counter", self.rejected),
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("requests_running", "gauge", running),
            ("requests_waiting", "gauge", waiting),
        ):
            lines += [f"# TYPE {prefix}{name} {kind}", f"{prefix}{name} {value}"]
        lines += self._first.lines(f"{prefix}time_to_first_token_seconds")
        lines += self._between.lines(f"{prefix}time_between_tokens_seconds")
        lines += self._whole.lines(f"{prefix}request_seconds")
        return metrics_file.text(engine_figures) + "\n".join(lines) + "\n"
