"""gptq:GROUP[:v2]: 4-bit codes [in / 8, out], scales, and zeros [groups, out / 8], stored less one except in the second version.

Inputs that are out of order (desc_act) are refused.
"""

import dataclasses

import numpy as np

from specmoe_jax.models.packing.kinds.int4_groups import NIBBLES, Int4Groups, in_order, in_pairs, parsed, spread
from specmoe_jax.models.packing.matrices import PublishedTensor, Sections


@dataclasses.dataclass(frozen=True)
class Gptq(Int4Groups):
    """less: what stored zeros lack."""

    less: int = 1
    mark = ".scales"

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        groups = columns // self.group
        return (
            PublishedTensor(".qweight", (columns // NIBBLES, rows), ("I32",), _codes),
            PublishedTensor(".qzeros", (groups, rows // NIBBLES), ("I32",), self._zeros),
            PublishedTensor(self.mark, (groups, rows), (self.scale_type,), _scales),
            PublishedTensor(".g_idx", (columns,), ("I32",), lambda parts, values: in_order(values, self.group), optional=True),
        )

    def _zeros(self, parts: Sections, values: np.ndarray) -> None:
        zeros = spread(values).T + np.uint8(self.less)
        if zeros.max() > 15:
            raise ValueError("holds a zero point of 16, beyond 4 bits, which is not built; take another checkpoint")
        parts["zeros"][...] = in_pairs(zeros)


def _codes(parts: Sections, values: np.ndarray) -> None:
    parts["codes"][...] = in_pairs(spread(values.T))


def _scales(parts: Sections, values: np.ndarray) -> None:
    parts["scales"][...] = values.T


def kind(parameters: str) -> Gptq:
    group, half_scales, _ = parsed(parameters)
    return Gptq(group=group, half_scales=half_scales, less=0 if "v2" in parameters.split(":") else 1)
