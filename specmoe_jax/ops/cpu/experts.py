"""expert_ffn by the compiled kernels: plain SwiGLU of weights in float32, bfloat16, or packed to 8 or 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.ops.cpu import _ffi

# What each form of packed experts adds to the call of the kernel.
FORMS = {"int8": {"bits": 8}, "int4": {"bits": 4}}


FORMS_BY_ADDRESS = ("int8", "int4")  # those that `table` takes too


def fits_plain(*arrays, ffn, packing, hidden, numbers) -> bool:
    """Blocks that are not packed."""
    return ffn is None and packing is None and _ffi.module() is not None


def plain(x, blocks, slots, *, ffn, packing, hidden, numbers):
    return _call("specmoe_expert_ffn", x, blocks, slots)


def fits_packed(*arrays, ffn, packing, hidden, numbers) -> bool:
    """Blocks that are packed in a way that the kernel decodes."""
    return packing in FORMS and _ffi.module() is not None


def packed(x, blocks, slots, *, ffn, packing, hidden, numbers):
    attributes = {name: np.int64(value) for name, value in {**FORMS[packing], **numbers}.items()}
    return _call("specmoe_packed_expert_ffn", x, blocks, slots, hidden=np.int64(hidden), **attributes)


def table(x, addresses, slots, *, hidden: int, packing: str | None):
    """Blocks by their addresses. Raises UserError without the compiled kernels."""
    _ffi.required()
    bits = 8 * x.dtype.itemsize if packing is None else FORMS[packing]["bits"]
    return _call("specmoe_expert_ffn_table", x, addresses, slots, bits=np.int64(bits), hidden=np.int64(hidden))


def _call(target: str, x, blocks, slots, **attributes):
    shape = jax.ShapeDtypeStruct((*slots.shape, x.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(target, shape, vmap_method="sequential")(x, blocks, slots, **attributes, **_ffi.choice())
