"""Which stored tensors the bytes of a packed expert are filled from."""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.packing.kinds.gguf import Gguf
from specmoe_jax.models.packing.matrices import MatrixKind, PublishedTensor, Sections, into, matrices, sections_of
from specmoe_jax.models.packing.registry import kind_of
from specmoe_jax.models.published.naming import stacked_layout
from specmoe_jax.models.spec import Layout, TensorSpec

FLOATS = ("F32", "F16", "BF16")  # that biases beside packed matrices are stored in


class PackedPart(NamedTuple):
    """A stored tensor, or one expert's entry of it, and how the sections of the expert are filled from it.

    index: the entry along the first axis, None for the whole tensor. The other fields as in PublishedTensor.
    """

    spec: TensorSpec
    dtypes: tuple[str, ...]
    fill: Callable[[Sections, np.ndarray], None]
    index: int | None = None
    optional: bool = False


def matrix_kind(packing: str) -> MatrixKind:
    """The published kind of that name."""
    return cast(MatrixKind, kind_of(packing))


def separate_parts(config: ExpertConfig, layout: Layout) -> tuple[PackedPart, ...] | None:
    """Of an expert whose matrices are separate tensors `MODULE.weight` in that layout; None for any other layout."""
    shapes = matrices(config)
    named = zip(layout, shapes, strict=False)
    if len(layout) != len(shapes) or any(p.index is not None or p.spec.shape != shapes[name] for p, name in named):
        return None
    assert config.packing is not None
    kind = matrix_kind(config.packing)
    return tuple(
        packed_part(stored, part.name.removesuffix(".weight"), matrix)
        for part, matrix in zip(layout, shapes, strict=True)
        for stored in kind.stored(*shapes[matrix])
    )


def stacked_parts(config: ModelConfig, moe: int, expert: int) -> tuple[PackedPart, ...]:
    """Of an expert whose matrices are entries of one tensor each (naming.stacked_layout): blocks of GGUF types, and biases."""
    experts, layout = config.layer_experts[moe], stacked_layout(config, config.expert_layers[moe], expert)
    kind = matrix_kind(str(experts.packing))
    assert isinstance(kind, Gguf)
    names = tuple(matrices(experts))
    blocks = [
        PackedPart(part.spec, (ggml,), _of_matrix(into("blocks"), name), expert)
        for part, name, ggml in zip(layout, names, kind.types, strict=False)
    ]
    firsts = (0, experts.hidden, 2 * experts.hidden)
    others = zip(layout[len(names) :], firsts, strict=False)
    biases = [PackedPart(part.spec, FLOATS, _into_biases(first), expert) for part, first in others]
    return (*blocks, *biases)


def _of_matrix(fill: Callable[[Sections, np.ndarray], None], matrix: str) -> Callable[[Sections, np.ndarray], None]:
    return lambda parts, values: fill(sections_of(parts, matrix), values)


def _into_biases(first: int) -> Callable[[Sections, np.ndarray], None]:
    def fill(parts: Sections, values: np.ndarray) -> None:
        parts["biases"][first : first + values.size] = values

    return fill


def packed_part(stored: PublishedTensor, module: str, matrix: str | None = None) -> PackedPart:
    """The part that one tensor of a module fills, of a matrix of an expert or of one that stands alone."""

    def fill(parts: Sections, values: np.ndarray) -> None:
        stored.fill(parts if matrix is None else sections_of(parts, matrix), values)

    return PackedPart(TensorSpec(module + stored.suffix, stored.shape), stored.dtypes, fill, optional=stored.optional)
