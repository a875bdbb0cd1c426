"""The command `specmoe`: names and modules of the commands, and their overview."""

import ast
import importlib
import importlib.util
import pathlib
import sys
import textwrap
import types
from typing import NoReturn

from specmoe_jax.cli import start

GROUPS = {
    "run a model": {
        "demo": "specmoe_jax.cli.demo",
        "generate": "specmoe_jax.cli.generate",
        "chat": "specmoe_jax.cli.chat",
        "serve": "specmoe_jax.cli.serve",
        "merge_outputs": "specmoe_jax.cli.merge_outputs",
        "evaluate": "specmoe_jax.cli.evaluate",
    },
    "choose a plan": {
        "explain": "specmoe_jax.cli.explain",
        "plan": "specmoe_jax.cli.plan",
        "doctor": "specmoe_jax.cli.doctor",
    },
    "checkpoints": {
        "convert": "specmoe_jax.cli.checkpoints.convert",
        "carve": "specmoe_jax.cli.checkpoints.carve",
    },
    "measure": {
        "benchmark": "specmoe_jax.cli.measure.benchmark",
        "benchmark_disk": "specmoe_jax.cli.measure.benchmark_disk",
        "benchmark_kernels": "specmoe_jax.cli.measure.benchmark_kernels",
        "measure_gpu": "specmoe_jax.cli.measure.measure_gpu",
    },
    "train": {
        "features": "specmoe_jax.cli.train.features",
        "train_eagle": "specmoe_jax.cli.train.train_eagle",
        "witness_data": "specmoe_jax.cli.train.witness_data",
        "train_witness": "specmoe_jax.cli.train.train_witness",
        "evaluate_witness": "specmoe_jax.cli.train.evaluate_witness",
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def load_command(name: str) -> types.ModuleType:
    """The module of a command; importing it defines its flags, so one process runs one command."""
    return importlib.import_module(COMMANDS[name])


def main() -> None:
    """specmoe COMMAND --flags."""
    start.prepare()
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "-help", "--help", "help"):
        print(overview())
    elif name == "--version":
        from specmoe_jax.support.version import __version__

        print(f"specmoe_jax {__version__}")
    elif name not in COMMANDS:
        _unknown(name)
    else:
        sys.argv = [f"specmoe {name}", *rest]
        run(name)


def run(name: str) -> None:
    """Imports a command and runs it with the flags of sys.argv."""
    from specmoe_jax.cli import common  # imports JAX

    common.run(load_command(name))


def overview() -> str:
    """Every command with the first line of what it says of itself, as far as 80 columns go."""
    width = max(map(len, COMMANDS))
    lines = ["usage: specmoe COMMAND --flags, specmoe COMMAND --help, specmoe --version"]
    for title, group in GROUPS.items():
        summaries = {name: textwrap.wrap(_summary(module), 76 - width) for name, module in group.items()}
        lines += ["", f"{title}:"]
        for name, (first, *more) in summaries.items():
            lines += [f"  {name:<{width}}  {first}", *(" " * (width + 4) + line for line in more)]
    return "\n".join(lines)


def _summary(module: str) -> str:
    """Read from the source, since importing a command defines its flags."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def _unknown(name: str) -> NoReturn:
    what = f"no command {name!r}" if name else "no command is given"
    start.usage_error(f"{what}; the commands are {', '.join(COMMANDS)}; specmoe --help tells what each does")
