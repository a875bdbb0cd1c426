"""Stored tensors -> arrays in the compute dtype, a small piece at a time, so that nothing is held twice."""

import math
import mmap
from typing import NamedTuple

import ml_dtypes
import numpy as np

from specmoe_jax.checkpoints.files import Reader, StoredTensor
from specmoe_jax.checkpoints.gguf import blocks
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.support.errors import CheckpointError

ALIGNMENT = 64  # device_put takes over a numpy buffer without a copy iff it starts at a multiple of this
HUGE_PAGE = 2 << 20  # numpy asks for huge pages; only whole ones save page faults
MAPPED_BYTES = 1 << 18
CHUNK_BYTES = 1 << 20  # stays in the cache between the read, the conversion and the check
# Rows per step of a transposing copy. numpy, 1024 x 4096, GB/s written: float32 4.3 with 16 rows, 2.7 with 32, 1.7 with all;
# bfloat16 2.7, 1.7 and 1.0, and 2.4 with 16 rows when not copied as integers.
TRANSPOSE_ROWS = 16
READERS = 2  # threads: one reads while the other converts; each holds one expert

TARGET_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EXPONENT_BITS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80)}


class Piece(NamedTuple):
    """Values in a stored tensor: `shape` of them from element `first` on."""

    tensor: StoredTensor
    first: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.tensor.entry.bytes // max(1, self.tensor.entry.size)


def whole(tensor: StoredTensor) -> Piece:
    """All of a tensor."""
    return Piece(tensor=tensor, first=0, shape=tensor.entry.shape)


def read_tensor(tensor: StoredTensor, dtype: str, *, check_finite: bool) -> np.ndarray:
    """A whole tensor as an array of the compute dtype. Raises CheckpointError."""
    out = aligned_empty(tensor.entry.shape, TARGET_DTYPES[dtype])
    fill(np.atleast_1d(out), whole(tensor))
    if check_finite:
        check_finite_values(np.atleast_1d(out), tensor, dtype)
    return out


def check_copy(copy: StoredTensor, original: StoredTensor) -> None:
    """Raises CheckpointError unless both are the same bit for bit; of two types, once they are rounded to bfloat16."""
    if copy.entry.dtype == original.entry.dtype:
        pairs = zip(*(t.read_steps(0, t.entry.bytes, CHUNK_BYTES) for t in (copy, original)), strict=True)
        same = all(one == other for one, other in pairs)
    else:
        one, other = (read_tensor(t, "bfloat16", check_finite=False) for t in (copy, original))
        same = np.array_equal(one.view(np.uint16), other.view(np.uint16))
    if not same:
        raise CheckpointError(
            f"{copy.where}: differs from {quote(original.entry.name)}, to which config.json ties it (tie_word_embeddings):"
            " set it to false there if this matrix is meant"
        )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty that starts at a multiple of ALIGNMENT, or of HUGE_PAGE where it spans some.

    From MAPPED_BYTES on in a mapping of its own, which the system has back as soon as it is dropped: an allocator keeps the blocks
    that a host cache evicts, each thread's in an arena of its own.
    """
    count = math.prod(shape) * dtype.itemsize
    if MAPPED_BYTES <= count < 2 * HUGE_PAGE:
        return np.frombuffer(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8).view(dtype).reshape(shape)
    alignment = ALIGNMENT if count < 2 * HUGE_PAGE else HUGE_PAGE
    raw = np.empty(count + alignment, np.uint8)  # what is skipped is never touched, so it takes no memory
    skip = -raw.ctypes.data % alignment
    return raw[skip : skip + count].view(dtype).reshape(shape)


def _rows(out: np.ndarray) -> np.ndarray:
    """The same memory with a first axis whose entries are small, where that takes no copy."""
    if out.ndim == 1:
        return out[None]
    return out.reshape(-1, out.shape[-1]) if out.flags.c_contiguous else out


def fill(out: np.ndarray, piece: Piece) -> None:
    """Reads and converts a piece into `out` of as many values, in order; `out` may be a transposed view."""
    out = _rows(out)
    if piece.tensor.form is not None:
        _fill_decoded(out, piece)
        return
    stored, first = piece.tensor.dtype, piece.first * piece.tensor.dtype.itemsize
    with Reader(piece.tensor) as reader:
        if out.dtype == stored and out.flags.c_contiguous:
            reader.read_into(out, first)
            return
        row_bytes = math.prod(out.shape[1:]) * stored.itemsize
        rows = max(1, CHUNK_BYTES // max(1, row_bytes))
        scratch = np.empty((min(rows, len(out)), *out.shape[1:]), stored)
        for row in range(0, len(out), rows):
            chunk = scratch[: len(out) - row]
            reader.read_into(chunk, first + row * row_bytes)
            _convert(out[row : row + rows], chunk)


def _convert(out: np.ndarray, chunk: np.ndarray) -> None:
    """out[...] = chunk, of another dtype or transposed; as integers and in thin strips where that is faster."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf, which the check for finite weights reports
        if out.flags.c_contiguous:
            out[...] = chunk
            return
        bits = np.dtype(f"u{out.dtype.itemsize}")
        chunk = chunk.astype(out.dtype, copy=False).view(bits)
    for row in range(0, len(out), TRANSPOSE_ROWS):
        out.view(bits)[row : row + TRANSPOSE_ROWS] = chunk[row : row + TRANSPOSE_ROWS]


def _fill_decoded(out: np.ndarray, piece: Piece) -> None:
    """Reads and decodes a piece of a GGUF tensor; whole where its rows are not in order."""
    form, row = piece.tensor.form, math.prod(out.shape[1:])
    assert form is not None
    in_order = not form.heads and not form.halves and row % piece.tensor.entry.shape[-1] == 0
    rows = max(1, CHUNK_BYTES // max(1, 4 * row)) if in_order else len(out)
    for start in range(0, len(out), rows):
        some = min(rows, len(out) - start)
        _convert(
            out[start : start + some],
            blocks.values(piece.tensor, piece.first + start * row, some * row).reshape(some, *out.shape[1:]),
        )


def check_finite_values(out: np.ndarray, tensor: StoredTensor, dtype: str) -> None:
    """A number is NaN or infinite iff all its exponent bits are set."""
    unsigned, exponent = EXPONENT_BITS[dtype]
    out = _rows(out.T if out.T.flags.c_contiguous else out)
    without_sign, rows = unsigned(np.iinfo(unsigned).max >> 1), max(1, CHUNK_BYTES // max(1, out[0].nbytes))
    for start in range(0, len(out), rows):
        bits = np.ascontiguousarray(out[start : start + rows]).view(unsigned)
        if ((bits & without_sign) >= exponent).any():
            raise CheckpointError(
                f"{tensor.where}: holds NaN or Inf; expected finite {dtype} weights (check_finite=False loads it anyway)"
            )
