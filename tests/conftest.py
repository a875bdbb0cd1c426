"""The tiny model of the package, for every test that needs one."""

import gc

import jax
import pytest

from specmoe_jax.testing import tiny

# A compiled program takes about seven memory maps, Linux gives a process 65,530, and XLA's answer to one too many is a crash.
# Programs are let go between files, where nothing shares them, and in the middle of one that makes very many.
BETWEEN_FILES, ANYWHERE = 1_000, 4_000
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


_since_let_go = Compilations()


def _let_go(most: int) -> None:
    if _since_let_go.count > most:
        jax.clear_caches()
        gc.collect()
        _since_let_go.count = 0


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
    yield
    _let_go(BETWEEN_FILES)


@pytest.fixture(autouse=True)
def programs_of_a_test():
    yield
    _let_go(ANYWHERE)
