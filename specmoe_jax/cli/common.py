"""The shared behaviour of all commands: flags with exit code 2, user errors as one line, the compile cache."""

import functools
import os
import pathlib
import signal
import sys
import types
import warnings
from collections.abc import Callable

import jax
from absl import app, flags, logging

from specmoe_jax.checkpoints.memory import raise_pinned_limit
from specmoe_jax.cli import processes, start
from specmoe_jax.cli.flag_groups.flag_names import with_flags
from specmoe_jax.cli.start import usage_error
from specmoe_jax.config.plan import Plan
from specmoe_jax.support.errors import PinnedMemoryError, PlanError, UserError
from specmoe_jax.support.jax_settings import use_compile_cache

__all__ = ["check_platforms", "guarded", "parse", "read_plan", "run", "usage_error", "use_compile_cache"]
NO_MEMORY = (
    "give a smaller --batch_size, leave experts on disk (--expert_tier=disk --host_memory_gib=N), or lift the limit (ulimit -v)"
)


def run(command: types.ModuleType) -> None:
    """Parses the flags and calls the command's `main()`. Exit 0 done, 1 failed (one line `error: ...`), 2 wrong usage."""
    app.run(lambda _: guarded(command.main, getattr(command, "join", None)), flags_parser=functools.partial(parse, command=command))


def read_plan(path: str) -> Plan:
    """A plan file. Raises UserError that names the file; its errors name fields, as the file does."""
    try:
        return Plan.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the plan {path} ({e}); write one with Plan.to_json or specmoe plan") from e
    except PlanError as e:
        raise UserError(f"{path}: {e}") from e


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


def guarded(main: Callable[[], None], join: Callable[[], None] | None = None) -> None:
    """Calls `main()`; an error that the user can fix is one line that names flags. join: called before JAX looks for devices."""
    logging.set_verbosity(logging.WARNING)  # at INFO, JAX lists missing accelerators, Orbax writes ten lines per checkpoint
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if code := start.stoppable(lambda: processes.to_the_end(lambda: _exit_code(main, join))):
        sys.exit(code)


def _exit_code(main: Callable[[], None], join: Callable[[], None] | None) -> int:
    try:
        raise_pinned_limit()
        if join is not None:
            join()
        check_platforms(os.environ.get("JAX_PLATFORMS"))
        main()
        sys.stdout.flush()
    except (PlanError, PinnedMemoryError) as e:  # from the library, which names fields
        return _failed(with_flags(str(e), flags.FLAGS))
    except UserError as e:
        return _failed(str(e))
    except (MemoryError, RuntimeError) as e:  # JAX's errors are RuntimeErrors
        if isinstance(e, RuntimeError) and not any(said in str(e) for said in ("RESOURCE_EXHAUSTED", "can't start new thread")):
            raise
        return _failed(f"the system gave no memory ({_first_line(e)}); {NO_MEMORY}")
    except OSError as e:
        if not start.stdout_failed():
            raise
        # A reader that has seen enough (head, a pager that is left) is no failure to tell of.
        return 128 + signal.SIGPIPE if isinstance(e, BrokenPipeError) else _failed(f"cannot write to stdout ({e.strerror})")
    except start.Stopped as e:
        return _failed(f"stopped by {e.signal.name}; the same command goes on where an --output was given", 128 + e.signal)
    return 0


def _failed(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
