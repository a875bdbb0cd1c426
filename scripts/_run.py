"""Runs a command of the package as a script; where a package is missing, one line says which."""

import sys


def run(name: str) -> None:
    """What `specmoe NAME` runs."""
    try:
        from specmoe_jax.cli import main, start

        start.prepare()
        from specmoe_jax.cli import common

        command = main.load_command(name)
    except ModuleNotFoundError as e:
        if e.name is not None and e.name.startswith("specmoe_jax."):
            raise  # a fault of the package's own
        sys.exit(
            f"error: {sys.executable} has no package {e.name}; run `pip install .` in the checkout, or the script with the Python "
            "of the environment where that was done"
        )
    common.run(command)
