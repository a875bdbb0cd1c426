"""Kernels behind one Python face, each with its jnp twin. Imports nothing of the package but types and config."""

from specmoe_jax.ops._ffi import isas
from specmoe_jax.ops.attention import MAX_NEW, chunked_attention
from specmoe_jax.ops.attention_ref import chunked_attention_ref
from specmoe_jax.ops.experts import expert_ffn
from specmoe_jax.ops.experts_ref import expert_ffn_ref
from specmoe_jax.ops.packed import (
    PackedCache,
    chunked_attention_packed,
    chunked_attention_packed_ref,
    empty_cache,
    pack_cache,
    unpack_cache,
)

__all__ = [
    "MAX_NEW",
    "PackedCache",
    "chunked_attention",
    "chunked_attention_packed",
    "chunked_attention_packed_ref",
    "chunked_attention_ref",
    "empty_cache",
    "expert_ffn",
    "expert_ffn_ref",
    "isas",
    "pack_cache",
    "unpack_cache",
]
