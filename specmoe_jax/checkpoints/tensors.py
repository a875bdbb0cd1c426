"""Stored tensors -> arrays in the compute dtype, a small piece at a time, so that nothing is held twice."""

import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from specmoe_jax.checkpoints import mxfp4
from specmoe_jax.checkpoints.files import Reader, StoredTensor
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.models.model import to_host
from specmoe_jax.support.errors import CheckpointError

ALIGNMENT = 64  # device_put takes over a numpy buffer without a copy iff it starts at a multiple of this
HUGE_PAGE = 2 << 20  # numpy asks for huge pages; only whole ones save page faults
CHUNK_BYTES = 1 << 20  # stays in the cache between the read, the conversion and the check
# Rows per step of a transposing copy. numpy, 1024 x 4096, GB/s written: float32 4.3 with 16 rows, 2.7 with 32, 1.7 with all;
# bfloat16 2.7, 1.7 and 1.0, and 2.4 with 16 rows when not copied as integers.
TRANSPOSE_ROWS = 16
READERS = 2  # threads: one reads while the other converts; each holds one expert

TARGET_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EXPONENT_BITS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80)}


class Piece(NamedTuple):
    """Values in a stored tensor: `shape` of them from element `first` on. scales: of MXFP4 codes, those of `tensor`."""

    tensor: StoredTensor
    first: int
    shape: tuple[int, ...]
    scales: "Piece | None" = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        item = self.tensor.entry.bytes // max(1, math.prod(self.tensor.entry.shape))
        return self.size * item + (self.scales.bytes if self.scales else 0)


class ExpertSource(NamedTuple):
    """Where the values of one expert's block are. pieces: each with the view of the block that it fills.

    mapped: whether its only piece is the block itself, as it lies in memory.
    """

    pieces: tuple[tuple[Piece, Callable[[np.ndarray], np.ndarray]], ...]
    block_shape: tuple[int, ...]
    mapped: bool = False

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece, _ in self.pieces)


def whole(tensor: StoredTensor) -> Piece:
    """All of a tensor."""
    return Piece(tensor=tensor, first=0, shape=tensor.entry.shape)


def read_tensor(tensor: StoredTensor, dtype: str, *, check_finite: bool) -> np.ndarray:
    """A whole tensor as an array of the compute dtype. Raises CheckpointError."""
    out = aligned_empty(tensor.entry.shape, TARGET_DTYPES[dtype])
    _fill(_rows(np.atleast_1d(out)), whole(tensor))
    if check_finite:
        _check_finite(np.atleast_1d(out), tensor, dtype)
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


def read_expert(source: ExpertSource, dtype: str, *, check_finite: bool) -> np.ndarray:
    """The block of an expert as models.spec says (bfloat16 as uint16 bits), 64-byte aligned. Raises CheckpointError."""
    block = aligned_empty(source.block_shape, TARGET_DTYPES[dtype])
    if not source.mapped:
        _clear_border(block)
    for piece, view in source.pieces:
        out = view(block)
        _fill(_rows(out), piece) if piece.scales is None else _fill_mxfp4(out, piece)
        if check_finite:
            _check_finite(out, piece.tensor, dtype)
    return block if dtype == "float32" else block.view(np.uint16)


class HostBlocks:
    """Experts in pinned host memory: mapped where they are stored as they are needed, else read and converted.

    A mapped block costs no copy and no memory until it is used (on an accelerator it is copied into pinned pages).
    """

    def __init__(self, dtype: str, *, check_finite: bool):
        self._dtype, self._check_finite = dtype, check_finite
        self._maps: dict[pathlib.Path, np.ndarray] = {}  # one map a file: each would keep a descriptor open

    def __call__(self, source: ExpertSource) -> jax.Array:
        """The block of an expert; bfloat16 as uint16 bits. Raises CheckpointError."""
        tensor = source.pieces[0][0].tensor
        if not is_mappable(source, self._dtype):
            return to_host(read_expert(source, self._dtype, check_finite=self._check_finite))
        if tensor.path not in self._maps:
            self._maps[tensor.path] = np.memmap(tensor.path, np.uint8, mode="r")
        block = self._maps[tensor.path][tensor.entry.start : tensor.entry.end]
        block = np.asarray(block).view(np.float32 if self._dtype == "float32" else np.uint16)
        return to_host(block.reshape(source.block_shape))


def is_mappable(source: ExpertSource, dtype: str) -> bool:
    """Whether the block stands in the file as it is needed in memory."""
    tensor = source.pieces[0][0].tensor
    as_needed = source.mapped and tensor.dtype == TARGET_DTYPES[dtype]
    return as_needed and tensor.entry.start % ALIGNMENT == 0


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty that starts at a multiple of ALIGNMENT, or of HUGE_PAGE where it spans some."""
    count = math.prod(shape) * dtype.itemsize
    alignment = ALIGNMENT if count < 2 * HUGE_PAGE else HUGE_PAGE
    raw = np.empty(count + alignment, np.uint8)  # what is skipped is never touched, so it takes no memory
    skip = -raw.ctypes.data % alignment
    return raw[skip : skip + count].view(dtype).reshape(shape)


def _clear_border(block: np.ndarray) -> None:
    """Zeroes what a bordered block holds beside weights and biases; of a plain one, one row that is filled afterwards."""
    block[:, -1] = 0
    block[:, :, -1] = 0


def _rows(out: np.ndarray) -> np.ndarray:
    """The same memory with a first axis whose entries are small, where that takes no copy."""
    if out.ndim == 1:
        return out[None]
    return out.reshape(-1, out.shape[-1]) if out.flags.c_contiguous else out


def _fill(out: np.ndarray, piece: Piece) -> None:
    """Reads and converts a piece into `out` of as many values, in order; `out` may be a transposed view."""
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


def _fill_mxfp4(out: np.ndarray, piece: Piece) -> None:
    """Reads and decodes codes and scales into `out` of as many values, in order."""
    _, groups, group_bytes = piece.shape
    inner = math.prod(out.shape[1:-1])  # stored rows to an entry of the first axis
    entries = max(1, CHUNK_BYTES // (4 * math.prod(out.shape[1:])))
    with Reader(piece.tensor) as codes, Reader(piece.scales.tensor) as scales:
        for start in range(0, len(out), entries):
            some = min(entries, len(out) - start)
            block = np.empty((some * inner, groups, group_bytes), np.uint8)
            scale = np.empty((some * inner, groups), np.uint8)
            codes.read_into(block, piece.first + start * inner * groups * group_bytes)
            scales.read_into(scale, piece.scales.first + start * inner * groups)
            out[start : start + some] = mxfp4.decode(block, scale).reshape(some, *out.shape[1:])


def _check_finite(out: np.ndarray, tensor: StoredTensor, dtype: str) -> None:
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
