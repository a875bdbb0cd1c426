"""compressed:GROUP[:zeros]: compressed-tensors' pack-quantized form of 4 bits, [out, in / 8], without zeros if symmetric.

Inputs that are out of order (actorder group) are refused.
"""

import dataclasses

import numpy as np

from specmoe_jax.models.packing.kinds.int4_groups import NIBBLES, Int4Groups, in_order, in_pairs, parsed, spread
from specmoe_jax.models.packing.matrices import PublishedTensor, Sections, into


@dataclasses.dataclass(frozen=True)
class Compressed(Int4Groups):
    mark = ".weight_scale"

    def stored(self, rows: int, columns: int) -> tuple[PublishedTensor, ...]:
        groups = columns // self.group

        def check_order(parts: Sections, values: np.ndarray) -> None:
            in_order(values, self.group)

        def check_shape(parts: Sections, values: np.ndarray) -> None:
            if tuple(values) != (rows, columns):
                raise ValueError(f"says {list(values)}; config.json asks for {[rows, columns]}")

        found = (
            PublishedTensor(".weight_packed", (rows, columns // NIBBLES), ("I32",), _codes),
            PublishedTensor(self.mark, (rows, groups), (self.scale_type,), into("scales")),
            PublishedTensor(".weight_shape", (2,), ("I64", "I32"), check_shape),
            PublishedTensor(".weight_g_idx", (columns,), ("I32",), check_order, optional=True),
        )
        zeros = PublishedTensor(".weight_zero_point", (rows // NIBBLES, groups), ("I32",), _zeros)
        return (*found, zeros) if self.zeros else found


def _codes(parts: Sections, values: np.ndarray) -> None:
    parts["codes"][...] = values.view(np.uint8).reshape(parts["codes"].shape)  # the nibbles of a word are in order


def _zeros(parts: Sections, values: np.ndarray) -> None:
    parts["zeros"][...] = in_pairs(spread(values.T).T)


def kind(parameters: str) -> Compressed:
    group, half_scales, zeros = parsed(parameters)
    return Compressed(group=group, half_scales=half_scales, zeros=zeros)
