"""Orbax export: the weights and each layer's experts as one PyTree checkpoint each, {name: array}."""

import hashlib
import json
import pathlib

import numpy as np

from specmoe_jax.checkpoints.conversion.write import Output, write_text
from specmoe_jax.checkpoints.files import MAX_INDEX_BYTES, read_json
from specmoe_jax.support.errors import CheckpointError

DESCRIPTION_FILE = "orbax.json"


def part_name(part: int, parts: int) -> str:
    """Folder of a part: 0 the weights, i the experts of layer i - 1."""
    return f"part-{part:05}"


def write_part(path: pathlib.Path, outputs: list[Output]) -> dict[str, str]:
    """Saves a part, all of it in memory at once (Orbax renames it into place). Returns sha256 by name."""
    tree = {output.name: output.read() for output in outputs}
    _checkpointer().save(path.absolute(), tree, force=True)
    return {name: _hash(array) for name, array in tree.items()}


def read_part(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a part. Raises CheckpointError when Orbax cannot read it."""
    try:
        return _checkpointer().restore(path.absolute())
    except Exception as e:  # Orbax and its store raise whatever they met
        raise CheckpointError(f"{path}: not readable as an Orbax checkpoint ({' '.join(str(e).split())[:120]})") from None


def stored_hashes(path: pathlib.Path) -> dict[str, str]:
    """sha256 by name of what a part holds. Raises CheckpointError."""
    return {name: _hash(array) for name, array in read_part(path).items()}


def write_description(folder: pathlib.Path, dtype: str, hashes: dict[str, str]) -> None:
    """What makes a folder of parts an export that can be imported and verified."""
    write_text(folder / DESCRIPTION_FILE, json.dumps({"version": 1, "dtype": dtype, "sha256": hashes}, indent=0))


def read_description(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
    """(dtype, sha256 by name). Raises CheckpointError."""
    raw = read_json(folder / DESCRIPTION_FILE, max_bytes=MAX_INDEX_BYTES)
    if raw.get("version") != 1 or not isinstance(raw.get("dtype"), str) or not isinstance(raw.get("sha256"), dict):
        raise CheckpointError(f"{DESCRIPTION_FILE}: expected version 1, a dtype and a sha256 for each tensor")
    return raw["dtype"], raw["sha256"]


def verified(folder: pathlib.Path, part: int, hashes: dict[str, str]) -> dict[str, np.ndarray]:
    """A part whose arrays have the hashes they were exported with. Raises CheckpointError."""
    name = part_name(part, 0)
    arrays = read_part(folder / name)
    for tensor, array in arrays.items():
        if hashes.get(tensor) != _hash(array):
            raise CheckpointError(f"{name}: tensor {tensor}: not what {DESCRIPTION_FILE} says was exported")
    return arrays


def _checkpointer():
    import orbax.checkpoint as ocp  # half a second to import, and only conversions need it

    return ocp.PyTreeCheckpointer()


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
