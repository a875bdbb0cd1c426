"""The metadata and the table of tensors of a GGUF file, whole or split; no tensor is read.

Parsed by the `gguf` package (optional extra `gguf`), which reads every entry of the vocabulary: seconds for a real one.
"""

import pathlib
import re
from typing import Any, NamedTuple

from specmoe_jax.checkpoints.header import quote, quote_list
from specmoe_jax.support.errors import CheckpointError, RequestError

SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GgufTensor(NamedTuple):
    """A tensor. type: ggml's name. shape: outermost first. start, end: bytes of its file."""

    name: str
    path: pathlib.Path
    type: str
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile(NamedTuple):
    """name: of the (first) file. fields: its metadata. tensors: those of all its parts, by name."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def field(self, key: str) -> Any:
        """Of the metadata. Raises CheckpointError where it is missing."""
        if key not in self.fields:
            raise CheckpointError(f"{self.name}: metadata {quote(key)}: missing")
        return self.fields[key]

    def own(self, key: str) -> Any:
        """`field` under the name of the architecture."""
        return self.field(f"{self.architecture}.{key}")

    def get(self, key: str, default: Any = None) -> Any:
        """`own`, or the default where it is missing."""
        return self.fields.get(f"{self.architecture}.{key}", default)


def parts_of(path: pathlib.Path) -> list[pathlib.Path]:
    """All files of a split one, of which `path` is any; else the file itself. Raises CheckpointError for missing ones."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    files = [path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(
            f"{path.name}: one of {count} parts, and {quote_list(missing)} missing beside it; download all of them"
        )
    return files


def read(path: pathlib.Path) -> GgufFile:
    """Parses the file and the others that it was split into. Raises CheckpointError; RequestError without the package."""
    tensors: dict[str, GgufTensor] = {}
    fields = None
    for part in parts_of(path):
        own, table = _read_part(part)
        fields = own if fields is None else fields
        if twice := sorted(set(table) & set(tensors)):
            raise CheckpointError(f"{part.name}: tensor {quote_list(twice)}: also in {tensors[twice[0]].path.name}; expected once")
        tensors |= table
    return GgufFile(name=path.name, fields=fields or {}, tensors=tensors)


def _read_part(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        import gguf
    except ImportError:
        raise RequestError(f"{path.name}: a GGUF file needs the gguf package: pip install specmoe_jax[gguf]") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        swapped = reader.byte_order != "I"
        tensors = {t.name: _tensor(path, t) for t in reader.tensors}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as e:
        raise CheckpointError(f"{path.name}: not a GGUF file that the gguf package reads ({' '.join(str(e).split())[:100]})") from e
    if swapped:
        raise CheckpointError(f"{path.name}: of the other byte order; convert it with gguf-convert-endian of the gguf package")
    return fields, tensors


def _tensor(path: pathlib.Path, tensor) -> GgufTensor:
    start = int(tensor.data_offset)
    shape = tuple(int(n) for n in tensor.shape[::-1])
    return GgufTensor(
        name=tensor.name, path=path, type=tensor.tensor_type.name, shape=shape, start=start, end=start + int(tensor.n_bytes)
    )
