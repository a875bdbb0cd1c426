"""Experts of a checkpoint in host memory: mapped where they are stored as they are needed, else read, and decoded if asked for.

Other matrices of a quantised checkpoint are decoded when they are loaded.
"""

import math
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.checkpoints.adapters.low_rank import LowRank
from specmoe_jax.checkpoints.files import STORED_DTYPES, Reader, StoredTensor
from specmoe_jax.checkpoints.gguf.blocks import raw_bytes
from specmoe_jax.checkpoints.tensors import (
    ALIGNMENT,
    TARGET_DTYPES,
    Piece,
    aligned_empty,
    check_finite_values,
    fill,
    read_tensor,
)
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.model import to_host
from specmoe_jax.models.packing import packed_bytes, unpacked
from specmoe_jax.models.packing.blocks import arrays, views
from specmoe_jax.models.packing.matrices import MatrixKind, Sections
from specmoe_jax.models.packing.parts import matrix_kind
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.types import Device


class ExpertSource(NamedTuple):
    """Where the values of one expert's block are.

    pieces: each with the view of the block that it fills; of a packed expert, with a function that fills sections of its bytes.
    config: what the expert computes, packed as it is stored. mapped: whether its only piece is the block itself, as it lies in
    memory. decode: whether a packed expert is decoded when it is read. deltas: what an adapter adds, each with
    the view of the block that it is added to.
    """

    pieces: tuple[tuple[Piece, Callable], ...]
    config: ExpertConfig
    mapped: bool = False
    decode: bool = False
    deltas: tuple[tuple[Callable, LowRank], ...] = ()

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(piece.bytes for piece, _ in self.pieces)

    @property
    def stays_packed(self) -> bool:
        return self.config.packing is not None and not self.decode

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of the block in memory."""
        return (packed_bytes(self.config),) if self.stays_packed else self.config.block_shape

    def block_dtype(self, dtype: str) -> np.dtype:
        """Of the block in memory; bfloat16 as uint16 bits."""
        if self.stays_packed:
            return np.dtype(np.uint8)
        return np.dtype(np.float32 if dtype == "float32" else np.uint16)

    def block_bytes(self, dtype: str) -> int:
        return math.prod(self.block_shape) * self.block_dtype(dtype).itemsize


class QuantisedMatrix(NamedTuple):
    """A matrix that is stored quantised and decoded when it is loaded. pieces: each with what fills sections of its bytes."""

    kind: MatrixKind
    shape: tuple[int, int]
    pieces: tuple[tuple[Piece, Callable[[Sections, np.ndarray], None]], ...]

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(piece.bytes for piece, _ in self.pieces)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class AdaptedWeight(NamedTuple):
    """A matrix that an adapter adds to when it is loaded."""

    weight: StoredTensor | QuantisedMatrix
    delta: LowRank

    @property
    def bytes(self) -> int:
        """On disk, without the adapter's."""
        return self.weight.bytes

    @property
    def size(self) -> int:
        return self.weight.size


Weight = StoredTensor | QuantisedMatrix | AdaptedWeight


def read_weight(weight: Weight, dtype: str, *, check_finite: bool) -> np.ndarray:
    """A tensor that is no expert, in the compute dtype. Raises CheckpointError."""
    if isinstance(weight, AdaptedWeight):
        values = read_weight(weight.weight, "float32", check_finite=check_finite)
        weight.delta.add_to(values)
        return values.astype(TARGET_DTYPES[dtype])
    if isinstance(weight, StoredTensor):
        return read_tensor(weight, dtype, check_finite=check_finite)
    kind, (rows, columns) = weight.kind, weight.shape
    layout = kind.matrix(rows, columns)
    parts = arrays(layout, np.empty(sum(section.bytes for section in layout.values()), np.uint8))
    _fill_sections(parts, weight.pieces)
    if check_finite and not kind.is_finite(parts):
        raise _not_finite(weight.pieces[0][0].tensor)
    return kind.decode_matrix(parts, columns, np).astype(TARGET_DTYPES[dtype])


def read_expert(source: ExpertSource, dtype: str, *, check_finite: bool) -> np.ndarray:
    """The block of an expert as models.spec says (bfloat16 as uint16 bits), or the bytes of one that stays packed; 64-byte aligned.

    Raises CheckpointError.
    """
    if source.deltas:
        return _read_adapted(source, dtype, check_finite=check_finite)
    if source.config.packing is None:
        return _read_plain(source, dtype, check_finite=check_finite)
    packed = _read_packed(source, check_finite=check_finite)
    if source.stays_packed:
        return packed
    block = aligned_empty(source.block_shape, TARGET_DTYPES[dtype])
    block[...] = unpacked(source.config, packed)
    return block if dtype == "float32" else block.view(np.uint16)


class HostBlocks:
    """Experts in pinned host memory: mapped where they are stored as they are needed, else read and converted.

    A mapped block costs no copy and no memory until it is used (on an accelerator it is copied into pinned pages).
    """

    def __init__(self, dtype: str, *, check_finite: bool):
        self._dtype, self._check_finite = dtype, check_finite
        self._maps: dict[pathlib.Path, np.ndarray] = {}  # one map a file: each would keep a descriptor open

    def __call__(self, source: ExpertSource, device: Device | None = None) -> jax.Array:
        """The block of an expert; bfloat16 as uint16 bits. Raises CheckpointError. device: as of `to_host`."""
        tensor = source.pieces[0][0].tensor
        if not is_mappable(source, self._dtype):
            return to_host(read_expert(source, self._dtype, check_finite=self._check_finite), device)
        if tensor.path not in self._maps:
            self._maps[tensor.path] = np.memmap(tensor.path, np.uint8, mode="r")
        block = self._maps[tensor.path][tensor.entry.start : tensor.entry.end]
        return to_host(np.asarray(block).view(source.block_dtype(self._dtype)).reshape(source.block_shape), device)


def is_mappable(source: ExpertSource, dtype: str) -> bool:
    """Whether the block stands in the file as it is needed in memory."""
    tensor = source.pieces[0][0].tensor
    if not source.mapped or source.deltas or tensor.entry.start % ALIGNMENT:
        return False
    return source.stays_packed if source.config.packing is not None else tensor.dtype == TARGET_DTYPES[dtype]


def _read_plain(source: ExpertSource, dtype: str, *, check_finite: bool) -> np.ndarray:
    block = aligned_empty(source.block_shape, TARGET_DTYPES[dtype])
    if not source.mapped:
        _clear_border(block)
    for piece, view in source.pieces:
        out = view(block)
        fill(out, piece)
        if check_finite:
            check_finite_values(out, piece.tensor, dtype)
    return block if dtype == "float32" else block.view(np.uint16)


def _read_adapted(source: ExpertSource, dtype: str, *, check_finite: bool) -> np.ndarray:
    """Summed in float32, then rounded once."""
    merged = read_expert(source._replace(deltas=()), "float32", check_finite=check_finite)
    for view, delta in source.deltas:
        delta.add_to(view(merged))
    if dtype == "float32":
        return merged
    block = aligned_empty(source.block_shape, TARGET_DTYPES[dtype])
    block[...] = merged
    return block.view(np.uint16)


def _read_packed(source: ExpertSource, *, check_finite: bool) -> np.ndarray:
    packed = aligned_empty((packed_bytes(source.config),), np.dtype(np.uint8))
    parts, first = views(source.config, packed), source.pieces[0][0].tensor
    if source.mapped:
        with Reader(first) as reader:
            reader.read_into(packed, 0)
    else:
        _fill_sections(parts, source.pieces)
    if check_finite and not source.mapped:
        assert source.config.packing is not None
        kind = matrix_kind(source.config.packing)
        if not (kind.expert_is_finite(source.config, parts) and np.isfinite(parts["biases"]).all()):
            raise _not_finite(first)
    return packed


def _fill_sections(parts: Sections, pieces: Iterable[tuple[Piece, Callable[[Sections, np.ndarray], None]]]) -> None:
    for piece, put in pieces:
        values = _stored_values(piece)
        try:
            put(parts, values)
        except ValueError as e:
            raise CheckpointError(f"{piece.tensor.where}: {e}") from e


def _stored_values(piece: Piece) -> np.ndarray:
    """As they are stored; of a GGUF tensor the bytes of its blocks."""
    if piece.tensor.form is not None:
        return raw_bytes(piece.tensor, piece.first, piece.size)
    dtype = np.dtype(STORED_DTYPES[piece.tensor.entry.dtype])
    values = np.empty(piece.shape, dtype)
    with Reader(piece.tensor) as reader:
        reader.read_into(values, piece.first * dtype.itemsize)
    return values


def _clear_border(block: np.ndarray) -> None:
    """Zeroes what a bordered block holds beside weights and biases; of a plain one, one row that is filled afterwards."""
    block[:, -1] = 0
    block[:, :, -1] = 0


def _not_finite(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.where}: decodes to NaN or Inf; expected finite weights (check_finite=False loads it anyway)")
