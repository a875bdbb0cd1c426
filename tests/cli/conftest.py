"""The tiny model as a checkpoint on disk, and the commands run in this process and, as scripts, in one of their own."""

import functools
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import types
from typing import NamedTuple

import absl.flags
import pytest
from absl.testing import flagsaver

from specmoe_jax.cli import common
from specmoe_jax.cli.main import COMMANDS
from specmoe_jax.planner.machines import machine
from specmoe_jax.testing import byte_tokenizer, write_tiny

GROUPS_OF_FLAGS = ("plan_flags", "sampling_flags", "engine_flags", "process_flags")
SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The weights of testing.tiny() in Hugging Face format. Never written to."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    return path


def load_script(name: str):
    """A command as a module, with flags of its own: other commands define some of the same names."""
    own = absl.flags.FlagValues()
    define = {name: functools.partial(f, flag_values=own) for name, f in vars(absl.flags).items() if name.startswith("DEFINE_")}
    stand_in = types.SimpleNamespace(**{**vars(absl.flags), **define, "FLAGS": own})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(absl, "flags", stand_in)
        for group in GROUPS_OF_FLAGS:  # define flags for whoever imports them first
            patch.delitem(sys.modules, f"specmoe_jax.cli.flag_groups.{group}", raising=False)
            patch.delattr(f"specmoe_jax.cli.flag_groups.{group}", raising=False)
        patch.delitem(sys.modules, COMMANDS[name], raising=False)
        return importlib.import_module(COMMANDS[name])


def in_process(script, capfd, monkeypatch, tmp_path):
    """Runs a script in this process, in an empty folder: arguments -> code, stdout, stderr."""
    own = script.flags.FLAGS
    monkeypatch.setattr(common, "use_compile_cache", lambda: None)
    monkeypatch.setattr(
        "specmoe_jax.autotune.choose.probe", lambda **_: machine("a30").replace(accelerator_is_cpu=True)
    )  # takes seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))  # what whoever runs the tests has measured is not asked
    monkeypatch.chdir(tmp_path)

    def run(*args) -> Ran:
        monkeypatch.setattr(common, "flags", script.flags)  # a test may run two commands
        code, saved = 0, flagsaver.save_flag_values(own)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        own.unparse_flags()
        try:
            common.parse([script.__name__, *map(str, args)], command=script)
            common.guarded(script.main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            flagsaver.restore_flag_values(saved, own)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def generate_script():
    return load_script("generate")


@pytest.fixture
def generate(generate_script, capfd, monkeypatch, tmp_path):
    return in_process(generate_script, capfd, monkeypatch, tmp_path)


@pytest.fixture
def merge_outputs(capfd, monkeypatch, tmp_path):
    return in_process(load_script("merge_outputs"), capfd, monkeypatch, tmp_path)


@pytest.fixture
def plan_command(capfd, monkeypatch, tmp_path):
    return in_process(load_script("plan"), capfd, monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def explain_script():
    return load_script("explain")


@pytest.fixture
def explain(explain_script, capfd, monkeypatch, tmp_path):
    return in_process(explain_script, capfd, monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Runs a script as a person does, in a process of its own; compiled programs are kept between runs."""
    cache = tmp_path_factory.mktemp("cache")

    def run(name, *args) -> Ran:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / name), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
