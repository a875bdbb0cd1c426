"""The tiny model of the package, for every test that needs one."""

import gc
import pathlib

import jax
import pytest

from specmoe_jax.testing import tiny

# A compiled program takes about seven memory maps, Linux gives a process 65,530, and XLA's answer to one too many is a crash.
MOST_MAPS = 20_000
_MAPS = pathlib.Path("/proc/self/maps")
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts what XLA compiles in this process; on its own, so that the engine's counter is checked too."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event, duration_s, **_):
        self.count += event == _COMPILATION


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session")
def compilations():
    return Compilations()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """After each file: what it compiled is let go once much has gathered."""
    yield
    if _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
