"""The files of a checkpoint directory: found, checked and opened for reading, one tensor at a time."""

import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from specmoe_jax.checkpoints.header import PREFIX_BYTES, Entry, Header, header_length, parse_header, quote, quote_list
from specmoe_jax.support.errors import CheckpointError

BLOCK_PREFIX = "specmoe.expert."  # of the names of experts in the converted format
PADDING_PREFIX = "specmoe.padding."  # between tensors of our layout
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OWN_METHOD = "specmoe"  # quant_method of experts that are packed as quantization_config's `packing` says
GGUF_TABLE = "gguf_tensors.json"  # of a directory that stands for a GGUF file (gguf/folder.py): where its tensors are
MAX_JSON_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20

NUMPY_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}
STORED_DTYPES = NUMPY_DTYPES | {"F8_E4M3": ml_dtypes.float8_e4m3fn, "U8": np.uint8, "I32": np.int32, "I64": np.int64}


class Form(NamedTuple):
    """How a tensor of a GGUF file is stored where its values are not there as they are used (gguf/blocks.py).

    entry.dtype is ggml's name of the type. heads: of the rows whose halves are interleaved. halves: the tensors that it is made of.
    """

    heads: int = 0
    halves: "tuple[StoredTensor, ...]" = ()


class StoredTensor(NamedTuple):
    """A tensor and the file that holds it. form: None for values in order."""

    path: pathlib.Path
    entry: Entry
    form: Form | None = None

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.entry.bytes

    @property
    def size(self) -> int:
        return self.entry.size

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.path.name}: tensor {quote(self.entry.name)}"

    @property
    def dtype(self) -> np.dtype:
        """Raises CheckpointError unless it is a floating-point type that weights are kept in."""
        if self.entry.dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"{self.where}: dtype is {self.entry.dtype}; weights are {', '.join(NUMPY_DTYPES)}")
        return np.dtype(NUMPY_DTYPES[self.entry.dtype])

    def read_steps(self, first: int, count: int, step: int) -> Iterator[memoryview]:
        """`count` bytes from byte `first` of the tensor on, `step` at a time. Raises CheckpointError."""
        with Reader(self) as reader:
            for at in range(first, first + count, step):
                piece = np.empty(min(step, first + count - at), np.uint8)
                reader.read_into(piece, at)
                yield piece.data


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory whose headers have been checked. tensors: by name. No tensor has been read."""

    path: pathlib.Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def bytes(self) -> int:
        """Those of the tensors."""
        return sum(tensor.entry.bytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[pathlib.Path]:
        """The files with weights, sorted."""
        return sorted({tensor.path for tensor in self.tensors.values()})


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Reads and checks index and headers of a directory. Raises CheckpointError."""
    if (path / GGUF_TABLE).exists():
        return _gguf_checkpoint(path)
    index, tensors, metadata = path / INDEX_FILE, {}, {}
    owners = read_index(index, suffix=".safetensors") if os.path.lexists(index) else None
    shards = [SINGLE_FILE] if owners is None else sorted(set(owners.values()))
    for shard in shards:
        header = read_header(path / shard)
        metadata |= header.metadata
        for name, entry in header.entries.items():
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor {quote(name)}: also in {tensors[name].path.name}; expected once")
            tensors[name] = StoredTensor(path / shard, entry)
    if owners is not None:
        _check_index(owners, tensors)
    return Checkpoint(path=path, tensors=tensors, metadata=metadata)


def read_index(path: pathlib.Path, *, suffix: str) -> dict[str, str]:
    """Tensor name -> file of this directory, which ends in `suffix`. Raises CheckpointError."""
    owners = read_json(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise CheckpointError(f"{path.name}: no weight_map; expected an object of tensor name to file name")
    for name, shard in owners.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard or not shard.endswith(suffix):
            raise CheckpointError(
                f"{path.name}: tensor {quote(name)}: is in {quote(str(shard))}; expected a *{suffix} file of this directory"
            )
    return owners


def read_header(path: pathlib.Path) -> Header:
    """The checked header of one safetensors file. Raises CheckpointError."""
    size = regular_file_bytes(path)
    try:
        with open(path, "rb") as file:
            length = header_length(file.read(PREFIX_BYTES), size, path.name)
            return parse_header(_exactly(file.read(length), length, path), size, path.name)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


def read_json(path: pathlib.Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """The JSON object of a small file, NaN and Infinity as its numbers may be. Raises CheckpointError for anything else."""
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path.name}: not JSON ({str(e)[:100]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: holds a JSON {type(value).__name__}; expected an object {{...}}")
    return value


def read_bytes(path: pathlib.Path, *, max_bytes: int = 128 << 20) -> bytes:
    """All of a small file. Raises CheckpointError."""
    size = regular_file_bytes(path)
    if size > max_bytes:
        raise CheckpointError(f"{path.name}: {size} bytes; expected at most {max_bytes}")
    try:
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


def regular_file_bytes(path: pathlib.Path) -> int:
    """Size of a regular file (symlinks followed). Raises CheckpointError for missing files, loops, directories, pipes."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); a checkpoint directory needs this file") from e
    except ValueError as e:  # a NUL in the name
        raise CheckpointError(f"{quote(str(path))}: not a file name") from e
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise CheckpointError(f"{path}: is {kind}; expected a file")
    return status.st_size


class Reader:
    """One open file, read at given places. A context manager. Raises CheckpointError when the file gives less."""

    def __init__(self, tensor: StoredTensor):
        self._tensor = tensor

    def __enter__(self) -> "Reader":
        try:
            self._file = open(self._tensor.path, "rb", buffering=0)
        except OSError as e:
            raise CheckpointError(f"{self._tensor.where}: cannot be read ({e.strerror})") from e
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read_into(self, out: np.ndarray, first: int) -> None:
        """Fills a contiguous array with `out.nbytes` bytes of the tensor, from its byte `first` on."""
        target = out.reshape(-1).view(np.uint8).data
        try:
            self._file.seek(self._tensor.entry.start + first)
            while target.nbytes:
                count = self._file.readinto(target)
                if not count:
                    raise CheckpointError(f"{self._tensor.where}: the file ended early; was it changed while being read?")
                target = target[count:]
        except OSError as e:
            raise CheckpointError(f"{self._tensor.where}: cannot be read ({e.strerror})") from e


def stored_tensors(rows: list[dict], file: str) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by Hugging Face's names. rows: of gguf/names.py. Raises CheckpointError, which names `file`."""
    tensors = {row["name"]: _gguf_tensor(row) for row in rows}
    if len(tensors) < len(rows):
        raise CheckpointError(f"{file}: two tensors have one name in Hugging Face's terms; expected one")
    sizes = {path: regular_file_bytes(path) for path in {tensor.path for tensor in tensors.values()}}
    for tensor in tensors.values():
        if tensor.entry.end > sizes[tensor.path]:
            raise CheckpointError(
                f"{tensor.where}: ends at byte {tensor.entry.end}, the file has {sizes[tensor.path]}: was it changed?"
            )
    return tensors


def _gguf_checkpoint(path: pathlib.Path) -> Checkpoint:
    table = read_json(path / GGUF_TABLE, max_bytes=MAX_INDEX_BYTES)
    return Checkpoint(path=path, tensors=stored_tensors(table["tensors"], table["name"]), metadata={"format": "gguf"})


def _gguf_tensor(row: dict) -> StoredTensor:
    entry = Entry(name=row["name"], dtype=row["dtype"], shape=tuple(row["shape"]), start=row["start"], end=row["end"])
    heads, halves = row.get("heads", 0), tuple(_gguf_tensor(half) for half in row.get("halves", ()))
    plain = entry.dtype in NUMPY_DTYPES and not heads and not halves
    return StoredTensor(pathlib.Path(row["file"]), entry, None if plain else Form(heads=heads, halves=halves))


def _check_index(owners: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, shard in owners.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{shard}: tensor {quote(name)}: named by {INDEX_FILE}, but not in this file")
    unnamed = [name for name in tensors if name not in owners]
    if unnamed:
        raise CheckpointError(f"{INDEX_FILE}: does not name {quote_list(unnamed)}, which its files hold")


def _exactly(data: bytes, length: int, path: pathlib.Path) -> bytes:
    if len(data) != length:
        raise CheckpointError(f"{path.name}: the file ended early; was it changed while being read?")
    return data
