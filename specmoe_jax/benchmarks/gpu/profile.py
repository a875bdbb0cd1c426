"""One step under JAX's profiler: what the host dispatched, and how long copies and kernels kept the accelerator busy."""

import collections
import gzip
import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax

COPIES = ("memcpyh2d", "memcpyhtod")  # in the names of the device's copy events, lower case
DISPATCH = "PjitFunction("


def profiled(step: Callable[[], object]) -> dict:
    """What a call of `step` did: wall time (profiled), dispatches by program, busy seconds of copies and kernels."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            begin_s = time.perf_counter()
            step()
            wall_s = time.perf_counter() - begin_s
        events = _events(pathlib.Path(folder))
        return figures(events, wall_s) | {"profiling_s": time.perf_counter() - start_s - wall_s}


def figures(events: list[dict], wall_s: float) -> dict:
    """Of Chrome trace events; pid names of devices begin with /device."""
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "/device" in event.get("args", {}).get("name", "").lower()
    }
    lanes = {
        (event["pid"], event.get("tid")): event["args"]["name"].lower() for event in events if event.get("name") == "thread_name"
    }
    spans = [event for event in events if event.get("ph") == "X"]
    programs = collections.Counter(
        event["name"].removeprefix(DISPATCH).rstrip(")") for event in spans if event["name"].startswith(DISPATCH)
    )
    on_device = [event for event in spans if event["pid"] in devices]
    copies = [event for event in on_device if any(name in event["name"].lower() for name in COPIES)]
    is_copy = {id(event) for event in copies}
    others = (event for event in on_device if id(event) not in is_copy)
    kernels = [event for event in others if "stream" in lanes.get((event["pid"], event.get("tid")), "")]
    return {
        "wall_s": wall_s,
        "dispatches": sum(programs.values()),
        "dispatches_by_program": dict(programs.most_common(12)),
        "copies": len(copies),
        "copies_busy_s": busy_s(copies),
        "kernels_busy_s": busy_s(kernels),
        "idle_s": wall_s - busy_s(copies + kernels) if on_device else None,
        "longest_gaps_between_copies_s": gaps_s(copies)[:8],
    }


def busy_s(spans: list[dict]) -> float:
    """Seconds in which at least one of the spans ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(spans, key=lambda event: event["ts"]):
        last = event["ts"] + event.get("dur", 0)
        total += max(last - max(event["ts"], end), 0)
        end = max(end, last)
    return total / 1e6


def gaps_s(spans: list[dict]) -> list[float]:
    """Seconds between one span and the next, the longest first."""
    ordered, gaps, end = sorted(spans, key=lambda event: event["ts"]), [], None
    for event in ordered:
        if end is not None and event["ts"] > end:
            gaps.append((event["ts"] - end) / 1e6)
        end = max(end or 0, event["ts"] + event.get("dur", 0))
    return sorted(gaps, reverse=True)


def _events(folder: pathlib.Path) -> list[dict]:
    (path,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]
