"""Experts that stay on disk: read or mapped one by one when they are asked for."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from specmoe_jax.checkpoints.experts import ExpertSource, HostBlocks, is_mappable, read_expert
from specmoe_jax.checkpoints.tensors import Piece
from specmoe_jax.support.errors import PlanError


@dataclasses.dataclass(frozen=True)
class DiskExperts(Sequence["DiskLayer"]):
    """The experts of a model in the place of Model.experts: `experts[layer][expert]` brings the block when it is asked for.

    Such a block is mapped where the layout allows it (convert.py), else read and converted, and not kept. The files must
    not change while the model is in use. sources: [layer][expert]. check_finite: of what is read and converted; the
    conversion that laid a mappable block out has checked it.
    """

    sources: tuple[tuple[ExpertSource, ...], ...]
    dtype: str
    check_finite: bool

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, layer: int) -> "DiskLayer":
        return DiskLayer(self.sources[layer], HostBlocks(self.dtype, check_finite=self.check_finite))

    @property
    def shape(self) -> tuple[int, int]:
        """L, E."""
        return len(self.sources), len(self.sources[0])

    @property
    def block_shapes(self) -> tuple[tuple[int, ...], ...]:
        """[L], those of each layer's experts."""
        return tuple(layer[0].block_shape for layer in self.sources)

    @property
    def block_dtype(self) -> np.dtype:
        return self.sources[0][0].block_dtype(self.dtype)

    @property
    def is_mapped(self) -> bool:
        """Whether every block stands in the files as it is needed in memory."""
        return all(is_mappable(source, self.dtype) for layer in self.sources for source in layer)

    def stored_bytes(self, layer: int, expert: int) -> int:
        """What a read of this expert takes from the disk."""
        return self.sources[layer][expert].bytes

    def read(self, layer: int, expert: int, *, keep_pages: bool = True) -> np.ndarray:
        """The block in memory of its own. Raises CheckpointError.

        keep_pages: False drops its pages from the system's cache afterwards, so that the next read is one of the disk.
        """
        source = self.sources[layer][expert]
        block = read_expert(source, self.dtype, check_finite=self.check_finite and not is_mappable(source, self.dtype))
        if not keep_pages:
            _drop_pages(source)
        return block

    def drop_pages(self) -> None:
        """Has the system forget all experts that it cached and nobody has mapped. Raises PlanError where it cannot."""
        if not hasattr(os, "posix_fadvise"):
            raise PlanError("bypass_page_cache has no effect on this system, which has no posix_fadvise; leave it out")
        for layer in self.sources:
            for source in layer:
                _drop_pages(source)


@dataclasses.dataclass(frozen=True)
class DiskLayer(Sequence[jax.Array]):
    """One layer of DiskExperts."""

    sources: tuple[ExpertSource, ...]
    host_blocks: HostBlocks

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, expert: int) -> jax.Array:
        return self.host_blocks(self.sources[expert])


def mapped(experts: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """All blocks, as pages of the files, of which none is read yet.

    Raises PlanError where the files are not laid out so.
    """
    assert isinstance(experts, DiskExperts)  # as an engine has made sure
    if not experts.is_mapped:
        raise PlanError(
            "expert_flow=host_compute with expert_tier=disk computes from the pages of the files, which do not hold experts in "
            f"{experts.dtype} as they are computed: specmoe convert --format=specmoe lays them out so, or use expert_flow=on_demand"
        )
    return [list(layer) for layer in experts]


def _drop_pages(source: ExpertSource) -> None:
    for piece, _ in source.pieces:
        _drop_piece(piece)


def _drop_piece(piece: Piece) -> None:
    """Whole pages only are dropped, so the range is widened to their bounds."""
    entry, page = piece.tensor.entry, os.sysconf("SC_PAGE_SIZE")
    start, stop = (entry.start + at * entry.bytes // max(1, entry.size) for at in (piece.first, piece.first + piece.size))
    first = start // page * page
    descriptor = os.open(piece.tensor.path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, first, -(-(stop - first) // page) * page, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class PartOfLayer(Sequence[jax.Array]):
    """One layer of a model that several processes hold: held[e] is this one's; None is read when asked for."""

    held: tuple[jax.Array | None, ...]
    on_disk: DiskLayer

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, expert: int) -> jax.Array:
        block = self.held[expert]
        return self.on_disk[expert] if block is None else block
