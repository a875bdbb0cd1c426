"""expert_ffn by the compiled kernels: of weights in float32, bfloat16, or packed in one of the forms below."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.ops.cpu import _ffi


class Form(NamedTuple):
    """The handler that decodes packed experts, and what it is told of them beside the numbers of the call."""

    target: str
    numbers: dict[str, int]


BLOCKS, ROWS, TABLE = "specmoe_packed_expert_ffn", "specmoe_rowwise_expert_ffn", "specmoe_expert_ffn_table"
FORMS = {
    "int8": Form(BLOCKS, {"bits": 8}),
    "int4": Form(BLOCKS, {"bits": 4}),
    "lossless": Form(BLOCKS, {"bits": 12}),
    # RowFormat of cpu_ops/rowwise_ffn.h
    "fp8": Form(ROWS, {"format": 0}),
    "mxfp4": Form(ROWS, {"format": 1}),
    "int4_groups": Form(ROWS, {"format": 2}),
    "nvfp4": Form(ROWS, {"format": 3}),
}


def fits_plain(*arrays, ffn, packing, hidden, numbers) -> bool:
    """Blocks that are not packed."""
    return ffn is None and packing is None and _ffi.module() is not None


def plain(x, blocks, slots, *, ffn, packing, hidden, numbers):
    return _call("specmoe_expert_ffn", x, blocks, slots)


def fits_packed(*arrays, ffn, packing, hidden, numbers) -> bool:
    """Blocks that are packed in a way that the kernel decodes."""
    return packing in FORMS and _ffi.module() is not None


def packed(x, blocks, slots, *, ffn, packing, hidden, numbers):
    form = FORMS[packing]
    return _call(form.target, x, blocks, slots, hidden=hidden, **form.numbers, **numbers)


def table(x, addresses, slots, *, hidden: int, packing: str | None, numbers: Mapping[str, int | float]):
    """Blocks by their addresses. Raises UserError without the compiled kernels."""
    _ffi.required()
    if packing is None:
        return _call(TABLE, x, addresses, slots, bits=8 * x.dtype.itemsize, hidden=hidden)
    form = FORMS[packing]
    target = TABLE if form.target == BLOCKS else form.target  # which takes both
    return _call(target, x, addresses, slots, hidden=hidden, **form.numbers, **numbers)


def _call(target: str, x, blocks, slots, **given: int | float):
    attributes = {name: np.float64(value) if isinstance(value, float) else np.int64(value) for name, value in given.items()}
    shape = jax.ShapeDtypeStruct((*slots.shape, x.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(target, shape, vmap_method="sequential")(x, blocks, slots, **attributes, **_ffi.choice())
