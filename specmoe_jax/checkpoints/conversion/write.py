"""Writing safetensors files: aligned for mapping, streamed tensor by tensor, whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from specmoe_jax.checkpoints.files import INDEX_FILE
from specmoe_jax.checkpoints.header import PREFIX_BYTES
from specmoe_jax.checkpoints.tensors import ALIGNMENT

PAGE = 4096
# From so many bytes on a tensor starts a page, which costs less than 1 % of it. Prefetchers of the processor end at a page: where
# rows of weights reach into the next one, a step at batch 1 takes 1.09 times as long (docs/benchmarks/models).
LEAST_PAGED = 128 * PAGE

STORED_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.uint8): "U8"}


class Output(NamedTuple):
    """A tensor to be written. read: gives the array when its turn comes, so that one is in memory at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_safetensors(path: pathlib.Path, outputs: list[Output], metadata: dict[str, str]) -> dict[str, str]:
    """Writes a file whose data starts a page, under a temporary name until it is complete.

    Returns the sha256 of each tensor as it was in memory.
    """
    hashes = {}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(outputs, metadata))
        for output in outputs:
            array = np.ascontiguousarray(output.read())
            assert array.dtype == output.dtype and array.shape == output.shape, output.name
            content = array.reshape(-1).view(np.uint8).data
            hashes[output.name] = hashlib.sha256(content).hexdigest()
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashes


def padded(outputs: list[Output], prefix: str) -> list[Output]:
    """The outputs with fillers, so that each starts at a multiple of 64 bytes, a large one a page; the format knows no holes."""
    result, at = [], 0
    for output in outputs:
        if missing := -at % (PAGE if output.bytes >= LEAST_PAGED else ALIGNMENT):
            filler = np.zeros(missing, np.uint8)
            result.append(Output(f"{prefix}{output.name}", filler.dtype, filler.shape, lambda filler=filler: filler))
        result.append(output)
        at += missing + output.bytes
    return result


def write_index(folder: pathlib.Path, owners: dict[str, str], total_bytes: int) -> None:
    """The index of a sharded checkpoint. owners: file name by tensor name."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(owners.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2))


def write_text(path: pathlib.Path, text: str) -> None:
    """A small file, replaced whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(outputs: list[Output], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": STORED_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, at + output.bytes],
        }
        at += output.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % PAGE)  # readers accept trailing spaces
    return struct.pack("<Q", len(text)) + text
