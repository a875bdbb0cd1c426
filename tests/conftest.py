"""The tiny model of the package for every test that needs one, the two tiers of the suite, and what workers share.

Quick tier (`pytest`): of each parametrised test the first case, without tests marked `slow`.
Everything: `pytest --tier=all`, or naming files or tests on the command line.
"""

import collections
import gc
import importlib.util
import itertools
import os
import threading

import jax
import pytest
from jax._src.interpreters import mlir

from specmoe_jax.autotune import operator_bench, profile, step_bench
from specmoe_jax.support.cache_files import machine_key
from specmoe_jax.support.host_memory import available_bytes
from specmoe_jax.testing import tiny

WORKER_BYTES = 7 << 30  # peak memory of one worker of a parallel run, measured at 7.1 GB

# A compiled program takes 20 to 40 memory maps, Linux gives a process 65,530, and XLA's answer to one too many is a crash.
# Programs are let go between files, where nothing shares them, and in the middle of one that makes very many.
BETWEEN_FILES, ANYWHERE = 8_000, 30_000  # maps
LOOK_EVERY = 40  # compilations: reading the maps takes milliseconds
LLVM_LEVEL = "--xla_backend_optimization_level"  # 3 unless it is set
QUICKLY_COMPILED = (f"{LLVM_LEVEL}=0", "--xla_cpu_parallel_codegen_split_count=1")
if jax.__version_info__ < (0, 11):  # an XLA that does not know a flag ends the process
    QUICKLY_COMPILED += ("--xla_cpu_use_fusion_emitters=false",)
_COMPILATION = "/jax/core/compile/backend_compile_duration"
CONTEXT_LASTS = 64  # programs; what a context has seen is let go with it


class Compilations:
    """Counts what XLA compiles in this process; on its own, so that the engine's counter is checked too."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event, duration_s, **_):
        self.count += event == _COMPILATION


class SharedContexts(threading.local):
    """MLIR contexts for several programs of a thread; JAX makes one for each, which is a third of a small program's compilation."""

    def __init__(self, make):
        self._make, self._uses = make, itertools.count()

    def __call__(self):
        if next(self._uses) % CONTEXT_LASTS == 0:
            self._context = self._make()
        return self._context


def pytest_addoption(parser):
    parser.addoption(
        "--tier",
        choices=("quick", "rest", "all"),
        help="quick: the first case of each parametrised test, none marked slow; rest: the others. Default: quick for "
        "the whole suite, all for files or tests that are named.",
    )


def pytest_configure(config):
    if importlib.util.find_spec("hypothesis"):  # a lent device has the tests that run there without it
        from hypothesis import settings as drawn

        drawn.register_profile("suite", deadline=None)  # tests time nothing: on a busy machine an example may wait
        drawn.load_profile("suite")
    if config.option.tier is None:  # workers of a parallel run are given the choice of the process that started them
        config.option.tier = "quick" if config.args_source == pytest.Config.ArgsSource.TESTPATHS else "all"
    # Programs compiled by one worker or an earlier run are read, not compiled again: half of the suite's processor time.
    folder = str(config.rootpath / ".pytest_cache" / machine_key("xla", jax.__version__))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)  # for the processes that tests start
        jax.config.update(name, value)
    if hasattr(mlir, "make_ir_context"):  # not of JAX's interface
        mlir.make_ir_context = SharedContexts(mlir.make_ir_context)
    # Thousands of small programs, each run a few times: three quarters of their processor time would be optimisation, which
    # `.ci/run` has in the comparison with the reference implementation and in the lossless tests.
    if LLVM_LEVEL not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = " ".join((given, *QUICKLY_COMPILED))


def pytest_xdist_auto_num_workers(config):
    """As many workers (`-n auto`) as there are cores and memory for."""
    return max(1, min(os.cpu_count() or 1, (available_bytes() or WORKER_BYTES) // WORKER_BYTES))


def pytest_collection_modifyitems(config, items):
    if config.option.tier == "all":
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    chosen = {
        case.nodeid
        for own in cases.values()
        for case in (own[:1] if own[0].get_closest_marker("every_case") is None else own)
        if case.get_closest_marker("slow") is None
    }
    wanted = config.option.tier == "quick"
    config.hook.pytest_deselected(items=[item for item in items if (item.nodeid in chosen) != wanted])
    items[:] = [item for item in items if (item.nodeid in chosen) == wanted]


def pytest_collection_finish():
    """What imports made stays: a tenth of the processor time went into looking through it again and again for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture
def short_profile(monkeypatch):
    """A profile of every operator, of a few shapes and as short as can be."""
    monkeypatch.setattr(profile, "SHAPES", ((1, 1), (2, 1), (2, 3), (4, 2)))
    monkeypatch.setattr(step_bench, "ROWS", (1, 2))
    monkeypatch.setattr(step_bench, "ROUNDS", 1)
    monkeypatch.setattr(step_bench, "STEPS", 3)
    monkeypatch.setattr(step_bench, "LAYER_ON_LINK_S", 1e-4)
    monkeypatch.setattr(operator_bench, "BUDGET_S", 0.0)


@pytest.fixture(scope="session")
def compilations():
    return Compilations()


_since_looked = Compilations()


def _maps() -> int:
    """Memory maps of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return file.read().count(b"\n")
    except OSError:
        return 0


def _let_go(most: int) -> None:
    if _since_looked.count < LOOK_EVERY:
        return
    _since_looked.count = 0
    if _maps() > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
    yield
    _let_go(BETWEEN_FILES)


@pytest.fixture(autouse=True)
def programs_of_a_test():
    yield
    _let_go(ANYWHERE)
