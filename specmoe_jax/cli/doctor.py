"""Checks the installation and lists what is missing: versions, the C++ kernels, devices, memory kinds, the bundled model."""

import importlib.metadata
import importlib.util
import platform
import sys

import jax

from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.ops.cpu import _ffi
from specmoe_jax.support.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "orbax-checkpoint", "optax", "tqdm")
_BAD_JAXLIB = "0.11.1"  # rewrites whole buffers on small in-loop updates (jax#40101)


def main() -> None:
    checks = [check_python(), *map(check_package, _PACKAGES), check_kernels(), *check_devices(), check_demo()]
    width = max(len(name) for name, _, _ in checks)
    for name, fine, detail in checks:
        print(f"{'ok     ' if fine else 'MISSING'}  {name:<{width}}  {detail}")
    missing = [name for name, fine, _ in checks if not fine]
    if missing:
        raise UserError(f"{len(missing)} checks failed: {', '.join(missing)}; reinstall with pip install .")


def check_python() -> tuple[str, bool, str]:
    return "python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.machine()} (3.11 or newer)"


def check_package(name: str) -> tuple[str, bool, str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, f"not installed; pip install {name}"
    if name == "jaxlib" and version == _BAD_JAXLIB:
        return name, False, f"{version} has a known fault on CPU (jax#40101); install another version"
    return name, True, version


def check_kernels() -> tuple[str, bool, str]:
    """The C++ extension is optional: without it everything runs on jnp, slower, after one warning."""
    isas = _ffi.isas()
    return "C++ kernels", bool(isas), f"instruction sets {', '.join(isas)}" if isas else "not usable (see the warning)"


def check_devices() -> list[tuple[str, bool, str]]:
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    return [
        ("accelerator", True, f"{device.device_kind} ({device.platform})"),
        ("pinned host memory", "pinned_host" in kinds, ", ".join(kinds)),
    ]


def check_demo() -> tuple[str, bool, str]:
    try:
        config = load_config(checkpoint_path("demo"))
    except UserError as e:
        return "bundled model", False, str(e)
    return "bundled model", True, f"{config.num_layers} layers, {config.num_experts} experts, top-{config.experts_per_token}"
