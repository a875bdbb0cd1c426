"""The shared behaviour of all commands: flags with exit code 2, user errors as one line, the compile cache."""

import functools
import os
import pathlib
import signal
import sys
import types
import warnings
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from specmoe_jax.checkpoints.memory import raise_pinned_limit
from specmoe_jax.cli.flag_names import with_flags
from specmoe_jax.config.plan import Plan
from specmoe_jax.support.cache_files import cache_folder
from specmoe_jax.support.errors import PinnedMemoryError, PlanError, UserError


def run(command: types.ModuleType) -> None:
    """Parses the flags and calls the command's `main()`. Exit 0 done, 1 failed (one line `error: ...`), 2 wrong usage."""
    app.run(lambda _: guarded(command.main), flags_parser=functools.partial(parse, command=command))


def usage_error(message: str) -> NoReturn:
    """Ends the command with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_plan(path: str) -> Plan:
    """A plan file. Raises UserError that names the file; its errors name fields, as the file does."""
    try:
        return Plan.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the plan {path} ({e}); write one with Plan.to_json or specmoe plan") from e
    except PlanError as e:
        raise UserError(f"{path}: {e}") from e


def use_compile_cache() -> None:
    """Keeps compiled programs between runs: a second start compiles nothing (1.3 s -> 0.07 s a program on CPU)."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_platforms(named: str | None) -> None:
    """Reports an invalid JAX_PLATFORMS in one line, before JAX does so in many."""
    if not named:
        return
    if "cpu" not in named.split(","):
        raise UserError(f"JAX_PLATFORMS={named} hides the host, where experts and cache are; give JAX_PLATFORMS={named},cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        reason = " ".join(str(e).split()) or "it does not start"
        raise UserError(
            f"JAX_PLATFORMS={named} cannot be had ({reason}); install its JAX (for example jax[cuda12]) or unset it"
        ) from e


def parse(argv: list[str], *, command: types.ModuleType) -> list[str]:
    """Sets the command's flags; --help tells what it does and which it takes."""
    if any(argument in ("-h", "-help", "--help", "--helpshort") for argument in argv[1:]):
        print(f"{command.__doc__}\n{flags.FLAGS.module_help(command.__name__)}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as e:
        usage_error(f"{e}; --help explains the flags")
    if len(rest) > 1:
        usage_error(f"unexpected argument {rest[1]!r}; every option starts with --, --help explains them")
    return rest


class Stopped(BaseException):
    """SIGTERM or Ctrl-C: not an Exception, so that no handler on the way mistakes it for a failure."""

    def __init__(self, signal_number: int):
        self.signal = signal.Signals(signal_number)


def _stop(signal_number: int, _frame) -> None:
    raise Stopped(signal_number)


def guarded(main: Callable[[], None]) -> None:
    """Calls `main()`; an error that the user can fix is one line that names flags."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    logging.set_verbosity(logging.WARNING)  # at INFO, JAX lists missing accelerators, Orbax writes ten lines per checkpoint
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        raise_pinned_limit()
        check_platforms(os.environ.get("JAX_PLATFORMS"))
        main()
    except (PlanError, PinnedMemoryError) as e:  # from the library, which names fields
        print(f"error: {with_flags(str(e), flags.FLAGS)}", file=sys.stderr)
        sys.exit(1)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except Stopped as e:
        print(f"error: stopped by {e.signal.name}; the same command goes on where an --output was given", file=sys.stderr)
        sys.exit(128 + e.signal)
