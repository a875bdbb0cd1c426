"""The version of the installed package."""

import importlib.metadata


def _installed() -> str:
    """From the package's metadata; a checkout that is only on the path has none."""
    try:
        return importlib.metadata.version("specmoe_jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = _installed()
