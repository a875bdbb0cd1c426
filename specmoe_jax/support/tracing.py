"""Profiles: one helper to record one, one to name a span of it; and the lanes of a streamed plan as a picture of their own."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

# `with span("verify", layer=3):` is a bar on the calling thread's lane; about 1 us where nothing records.
span = jax.profiler.TraceAnnotation


@contextlib.contextmanager
def trace(folder: str | None) -> Iterator[None]:
    """Records what happens inside under `folder` (plugins/profile/DATE), perfetto_trace.json.gz among it; None records nothing.

    Open it at ui.perfetto.dev. A profile holds about a million events: trace a short run.
    """
    if folder is None:
        yield
        return
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield


class Span(NamedTuple):
    """When a task of a streamed pass ran (offload/stream_schedule.py), in seconds of time.perf_counter. layer, micro_batch: -1 for
    the draft."""

    kind: str
    lane: str
    layer: int
    micro_batch: int
    start_s: float
    end_s: float


def busy_s(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds in which each lane worked."""
    lanes = sorted({one.lane for one in spans})
    return {lane: sum(one.end_s - one.start_s for one in spans if one.lane == lane) for lane in lanes}


def write_lanes(spans: Sequence[Span], path: str | pathlib.Path) -> None:
    """The spans as a trace that ui.perfetto.dev and chrome://tracing open: one named lane per resource."""
    lanes = {lane: number for number, lane in enumerate(sorted({one.lane for one in spans}))}
    start_s = min((one.start_s for one in spans), default=0.0)
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}} for lane, number in lanes.items()]
    bars = [
        {
            "name": one.kind if one.layer < 0 else f"{one.kind} {one.layer}",
            "ph": "X",
            "pid": 0,
            "tid": lanes[one.lane],
            "ts": (one.start_s - start_s) * 1e6,
            "dur": (one.end_s - one.start_s) * 1e6,
            "args": {"layer": one.layer, "item": one.micro_batch},
        }
        for one in spans
    ]
    pathlib.Path(path).write_text(json.dumps({"traceEvents": names + bars}), encoding="utf-8")
