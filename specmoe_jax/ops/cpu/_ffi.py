"""The only file that imports the compiled kernels: loads them, checks that this jaxlib can run them, registers them."""

import functools
import importlib
import importlib.metadata
import os
import re
import warnings
from pathlib import Path

import jax
import numpy as np

from specmoe_jax.support.errors import UserError

PACKAGE = Path(__file__).parents[2]


class Unusable(Exception):
    """Why the compiled kernels cannot be used."""


def runtime_api() -> tuple[int, int]:
    """XLA FFI API version of the installed jaxlib, from the header it ships."""
    text = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    return int(found["MAJOR"]), int(found["MINOR"])


def check_api(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """A handler newer than the runtime is rejected at backend start, which takes the whole CPU backend down: refuse it here."""
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise Unusable(
            f"built for XLA FFI {built[0]}.{built[1]} but this jaxlib offers {runtime[0]}.{runtime[1]}; "
            "reinstall specmoe_jax or install a newer jaxlib"
        )


def how_to_have_them(folder: Path) -> str:
    """What to do where the package that was imported, in this folder, has no compiled kernels."""
    if not (folder / "cpu_ops").is_dir():
        return "reinstall specmoe_jax with a C++ compiler on the machine"
    try:
        installed = Path(str(importlib.metadata.distribution("specmoe_jax").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        installed = folder
    if installed.resolve() == folder.resolve():
        return f"this is the source tree {folder}: pip install -e . compiles them"
    return (
        f"Python took the source tree {folder}, not the package installed in {installed}, because it looks first in the working "
        "directory and PYTHONPATH: run it in another folder or with python -P, or pip install -e ."
    )


def _load():
    try:
        module = importlib.import_module("specmoe_jax._cpu_ops")
    except ImportError as e:
        raise Unusable(f"the compiled kernels are missing ({e}); {how_to_have_them(PACKAGE.parent)}") from e
    check_api(tuple(module.ffi_api), runtime_api())
    return module


@functools.cache
def module():
    """The compiled module, registered with XLA; None (and one warning) when it is unusable. SPECMOE_CPU_OPS=ref asks for None."""
    mode = os.environ.get("SPECMOE_CPU_OPS", "auto")
    if mode not in ("auto", "ref"):
        raise UserError(f"SPECMOE_CPU_OPS is {mode!r}; it must be 'auto' or 'ref'")
    if mode == "ref":
        return None
    try:
        loaded = _load()
    except Unusable as e:
        warnings.warn(f"specmoe_jax.ops runs its slower jnp forms: {e}", RuntimeWarning, stacklevel=2)
        return None
    for name, capsule in loaded.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return loaded


def isas() -> list[str]:
    """Instruction sets of the kernels that this machine can run, best first; empty without the extension."""
    loaded = module()
    return [] if loaded is None else loaded.isas()


def has_tiles() -> bool:
    """Whether the kernels multiply bfloat16 in the tiles of AMX."""
    isa = choice()["isa"]
    return module() is not None and (isas()[0] if isa == "auto" else isa) == "amx"


def choice() -> dict:
    """Attributes that every handler takes: SPECMOE_ISA forces an instruction set, SPECMOE_THREADS bounds the threads (0: all)."""
    isa = os.environ.get("SPECMOE_ISA", "auto")
    if isa != "auto" and isa not in isas():
        raise UserError(f"SPECMOE_ISA is {isa!r}; this machine has {', '.join(['auto', *isas()])}")
    return {"isa": isa, "threads": np.int64(os.environ.get("SPECMOE_THREADS", "0"))}


def chosen_kernels() -> tuple:
    """What a measurement of this machine depends on: which build of the kernels runs, and how (`choice`)."""
    loaded = module()
    if loaded is None:
        return ("none",)
    file = os.stat(str(loaded.__file__))
    return (file.st_size, file.st_mtime_ns, *map(str, choice().values()))


def required():
    loaded = module()
    if loaded is None:
        raise UserError("the compiled kernels are not usable here; reinstall specmoe_jax with a C++ compiler on the machine")
    return loaded


def read_bandwidth(num_bytes: int, threads: int) -> float:
    """Bytes per second of a pure read, in this process (benchmarks)."""
    return required().read_bandwidth("auto", num_bytes, threads)


def fma_peak(threads: int) -> float:
    """Float32 flop/s of independent fused multiply-adds, in this process (benchmarks)."""
    return required().fma_peak("auto", threads)
