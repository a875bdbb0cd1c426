"""The header of a safetensors file, checked in full before any tensor of it is read. Pure: bytes in, entries out.

Format (huggingface/safetensors, README): 8 bytes little-endian length N, N bytes of JSON
{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, perhaps padded with spaces, then the data without holes.
"""

import json
import math
from typing import NamedTuple

from specmoe_jax.support.errors import CheckpointError

PREFIX_BYTES = 8
# Room for some 100,000 tensors. The official reader stops at 100 MB, which Python could turn into gigabytes of objects.
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSION = 1 << 48

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor of a file. start, end: byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """entries: by name. metadata: the file's "__metadata__", {} when absent."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def header_length(prefix: bytes, file_bytes: int, file: str) -> int:
    """N from the first 8 bytes of a file of `file_bytes`. Raises CheckpointError unless a header can be there."""
    if len(prefix) < PREFIX_BYTES or file_bytes < PREFIX_BYTES + 2:
        raise CheckpointError(f"{file}: {file_bytes} bytes; a safetensors file has at least 10: is the download complete?")
    length = int.from_bytes(prefix, "little")
    if length < 2:
        raise CheckpointError(f"{file}: header length is {length}; expected at least 2: this is no safetensors file")
    if length > file_bytes - PREFIX_BYTES:
        raise CheckpointError(f"{file}: header length is {length}, but the file has {file_bytes} bytes: is the download complete?")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header length is {length}; at most {MAX_HEADER_BYTES} bytes are read")
    return length


def parse_header(text: bytes, file_bytes: int, file: str) -> Header:
    """Header of a file of `file_bytes` from its JSON bytes.

    Every entry lies inside the file, has a known dtype and as many bytes as its shape asks for, and the entries fill
    the data without overlap or hole. Raises CheckpointError naming `file`, the tensor and what was expected.
    """
    raw = _load_json(text, file)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not a JSON object of strings")
    data_start = PREFIX_BYTES + len(text)
    entries = {name: _entry(name, value, data_start, file_bytes, file) for name, value in raw.items()}
    _check_layout(entries, data_start, file_bytes, file)
    return Header(entries=entries, metadata=metadata)


def quote(name: str, *, limit: int = 120, spaces: bool = False) -> str:
    """A name from a file as one printable piece of a message, whatever is in it. spaces: they need no quotes."""
    text = name if len(name) <= limit else name[:limit] + "..."
    return text if text.isprintable() and text and (spaces or " " not in text) else ascii(text)


def quote_list(names: list[str], limit: int = 6) -> str:
    """Names for a message: the first few, then a count."""
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _load_json(text: bytes, file: str) -> dict:
    if text[:1] != b"{":
        raise CheckpointError(f"{file}: the header starts with {text[:1]!r}; expected '{{': this is no safetensors file")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{file}: the header is not UTF-8 at byte {e.start}: the file is damaged") from e
    try:
        return json.loads(decoded, object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as e:
        raise CheckpointError(f"{file}: tensor {quote(str(e))}: named twice in the header; expected once") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: the header is not JSON ({_reason(e)}): the file is damaged or truncated") from e


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        raise _DuplicateKeyError(next(k for k, _ in pairs if k in seen or seen.add(k)))
    return result


def _entry(name: str, value, data_start: int, file_bytes: int, file: str) -> Entry:
    where = f"{file}: tensor {quote(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: dtype is {quote(str(dtype))}; expected one of {', '.join(DTYPE_BITS)}")
    if not _is_naturals(shape) or len(shape) > 8 or any(d > MAX_DIMENSION for d in shape):
        raise CheckpointError(f"{where}: shape is {quote(str(shape), spaces=True)}; expected at most 8 sizes below 2^48")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets is {quote(str(offsets), spaces=True)}; expected [begin, end], begin <= end")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} needs {-(-bits // 8)} bytes, its offsets hold {offsets[1] - offsets[0]}"
        )
    if data_start + offsets[1] > file_bytes:
        raise CheckpointError(
            f"{where}: ends at byte {data_start + offsets[1]}, the file has {file_bytes}: is the download complete?"
        )
    return Entry(name=name, dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], end=data_start + offsets[1])


def _is_naturals(value) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_layout(entries: dict[str, Entry], data_start: int, file_bytes: int, file: str) -> None:
    at, before = data_start, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != at:
            what = "overlaps" if entry.start < at else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {quote(entry.name)}: starts at byte {entry.start} and {what} {before}; expected {at}"
            )
        at, before = entry.end, quote(entry.name)
    if at != file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - at} bytes after the last tensor; expected the file to end at {at}")
