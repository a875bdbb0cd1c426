"""awq:GROUP: 4-bit codes, scales and zeros as AWQ's gemm layout stores them, [in, out / 8]."""

import dataclasses

import numpy as np

from specmoe_jax.models.packing.kinds.int4_groups import NIBBLES, Int4Groups, in_pairs, parsed, spread
from specmoe_jax.models.packing.matrices import PublishedTensor, Sections

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in the nibbles of a word


@dataclasses.dataclass(frozen=True)
class Awq(Int4Groups):
    mark = ".scales"

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        groups, words = columns // self.group, rows // NIBBLES
        return (
            PublishedTensor(".qweight", (columns, words), ("I32",), _codes),
            PublishedTensor(".qzeros", (groups, words), ("I32",), _zeros),
            PublishedTensor(self.mark, (groups, rows), (self.scale_type,), _scales),
        )


def _codes(parts: Sections, values: np.ndarray) -> None:
    parts["codes"][...] = in_pairs(spread(values, ORDER).T)


def _zeros(parts: Sections, values: np.ndarray) -> None:
    parts["zeros"][...] = in_pairs(spread(values, ORDER).T)


def _scales(parts: Sections, values: np.ndarray) -> None:
    parts["scales"][...] = values.T


def kind(parameters: str) -> Awq:
    group, half_scales, _ = parsed(parameters)
    return Awq(group=group, half_scales=half_scales)
