"""What the kinds share that checkpoints are published in: each matrix of an expert packed on its own, as it is stored, [out, in].

Published formats scale weights in blocks or in groups along the inputs of a matrix. Kept in that direction, also down, the stored
bytes are what lies in memory, and every weight decodes exactly.
"""

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing.kind import Kernel, Section, border_biases

Sections = Mapping[str, np.ndarray]
KERNEL_UNIT = 32  # of which the compiled kernel wants whole numbers in both dimensions of an expert


class PublishedTensor(NamedTuple):
    """A tensor of a checkpoint that a packed matrix is filled from.

    suffix: of its name, behind the module's. dtypes: as safetensors call them. fill: (sections of the matrix, stored values) puts
    them where they belong, or raises ValueError with what is wrong with them. optional: may be missing.
    """

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    fill: Callable[[Sections, np.ndarray], None]
    optional: bool = False


class MatrixKind:
    """A packing kind of which a subclass says how one matrix is packed.

    mark: a suffix that only packed matrices have. fused: whether all experts of a layer are published in one tensor, so that their
    family says what it holds (`packed_parts`). stacked: whether they are published in one tensor a matrix, whatever the family.
    converted: whether nobody publishes them, and a conversion lays whole experts out so.
    """

    published = True
    fused = False
    stacked = False
    converted = False
    mark: str

    def matrix(self, rows: int, columns: int) -> dict[str, Section]:
        """What the bytes of a matrix [rows, columns] hold, in order."""
        raise NotImplementedError

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        """The tensors of a checkpoint that hold such a matrix."""
        raise NotImplementedError

    def decode_matrix(self, parts: Mapping[str, Any], columns: int, xp: ModuleType) -> Any:
        """[rows, columns] in float32, exactly."""
        raise NotImplementedError

    def is_finite(self, parts: Sections) -> bool:
        """Whether a matrix decodes to numbers alone."""
        raise NotImplementedError

    def kernel(self, config: ExpertConfig) -> Kernel | None:
        return None

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot be packed so; None: it can."""
        return None

    def expert_is_finite(self, config: ExpertConfig, parts: Sections) -> bool:
        """Whether the matrices of an expert decode to numbers alone."""
        return all(self.is_finite(sections_of(parts, matrix)) for matrix in matrices(config))

    def expert_problem(self, config: ExpertConfig) -> str | None:
        """Why an expert of this shape cannot be packed so; None: it can."""
        return next((found for shape in matrices(config).values() if (found := self.problem(*shape))), None)

    def sections(self, config: ExpertConfig) -> dict[str, Section]:
        found = {
            f"{name}.{part}": section
            for name, (rows, columns) in matrices(config).items()
            for part, section in self.matrix(rows, columns).items()
        }
        return found | {"biases": border_biases(config)}

    def decode(self, config: ExpertConfig, parts: Mapping[str, Any], xp: ModuleType) -> Any:
        decoded = {
            name: self.decode_matrix(sections_of(parts, name), columns, xp) for name, (_, columns) in matrices(config).items()
        }
        *inner, down = decoded.values()
        return xp.stack([*inner, down.T])


def rowwise_kernel(
    config: ExpertConfig, form: str, *, group: int, block_rows: int = 1, half_scales: bool = False, zeros: bool = False
) -> Kernel | None:
    """The compiled kernel of matrices that are packed row by row (cpu_ops/rowwise_ffn.h), where it computes such experts."""
    if config.activation == "relu" or config.model % KERNEL_UNIT or config.hidden % KERNEL_UNIT:
        return None
    scales = {"group": group, "block_rows": block_rows, "half_scales": half_scales, "zeros": zeros}
    activation = {"clamped": config.activation == "clamped_swiglu", "alpha": float(config.alpha), "limit": float(config.limit)}
    return Kernel(form, scales | activation | {"biased": config.biased})


def matrices(config: ExpertConfig) -> dict[str, tuple[int, int]]:
    """The matrices of an expert as they are stored: name -> [out, in]."""
    inner = {name: (config.hidden, config.model) for name in ("gate", "up")[-(config.matrices - 1) :]}
    return inner | {"down": (config.model, config.hidden)}


def sections_of(parts: Mapping[str, Any], matrix: str) -> dict[str, Any]:
    """The sections of one matrix out of those of an expert."""
    prefix = f"{matrix}."
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}


def into(section: str) -> Callable[[Sections, np.ndarray], None]:
    """A `fill` that copies the stored values into a section, in order."""

    def fill(parts: Sections, values: np.ndarray) -> None:
        target = parts[section]
        target[...] = values.reshape(target.shape).astype(target.dtype, copy=False)

    return fill


def ignored(parts: Sections, values: np.ndarray) -> None:
    """A `fill` for what does not change the weights."""


def groups_of(size: int, group: int) -> int:
    """Groups of so many that cover a size."""
    return math.ceil(size / group)
