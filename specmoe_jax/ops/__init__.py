"""The operations that are worth more than one implementation. Imports nothing of the package but support, config and types.

`reference/`: from the definition, slow, for tests. `xla/`: what an accelerator runs, and a CPU where no compiled kernel fits.
`cpu/`: the compiled kernels. Which of them runs is decided in `dispatch`.
"""

from specmoe_jax.ops.attention import chunked_attention, chunked_attention_packed, masked_attention, prefill_attention
from specmoe_jax.ops.cpu._ffi import chosen_kernels, isas
from specmoe_jax.ops.cpu.attention import MAX_NEW
from specmoe_jax.ops.dense import PackedMatrix, dense_product, dense_products
from specmoe_jax.ops.experts import expert_ffn, expert_ffn_table
from specmoe_jax.ops.packed import PackedCache, empty_cache, pack_cache, unpack_cache
from specmoe_jax.ops.reference.attention import chunked_attention_packed_ref, chunked_attention_ref
from specmoe_jax.ops.reference.dense import dense_product_ref, packed_product_ref
from specmoe_jax.ops.reference.experts import expert_ffn_ref
from specmoe_jax.ops.rows import append, put_row, put_rows

__all__ = [
    "MAX_NEW",
    "PackedCache",
    "PackedMatrix",
    "append",
    "chosen_kernels",
    "chunked_attention",
    "chunked_attention_packed",
    "chunked_attention_packed_ref",
    "chunked_attention_ref",
    "dense_product",
    "dense_product_ref",
    "dense_products",
    "empty_cache",
    "expert_ffn",
    "expert_ffn_ref",
    "expert_ffn_table",
    "isas",
    "masked_attention",
    "pack_cache",
    "packed_product_ref",
    "prefill_attention",
    "put_row",
    "put_rows",
    "unpack_cache",
]
