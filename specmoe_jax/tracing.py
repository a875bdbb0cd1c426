"""Profiles in the words of the function names: one helper to record one, one to name a span of it."""

import contextlib
from collections.abc import Iterator

import jax

span = (
    jax.profiler.TraceAnnotation
)  # `with span("verify", layer=3):` is a bar on the calling thread's lane; about 1 us where nothing records


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
