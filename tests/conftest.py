"""The tiny model of the package, for every test that needs one."""

import jax
import pytest

from specmoe_jax.testing import tiny

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
