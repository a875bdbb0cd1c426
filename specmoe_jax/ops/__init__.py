"""Kernels behind one Python face, each with its jnp twin. Imports nothing of the package but types and config."""

from specmoe_jax.ops._ffi import isas
from specmoe_jax.ops.attention import chunked_attention
from specmoe_jax.ops.attention_ref import chunked_attention_ref
from specmoe_jax.ops.experts import expert_ffn
from specmoe_jax.ops.experts_ref import expert_ffn_ref

__all__ = ["chunked_attention", "chunked_attention_ref", "expert_ffn", "expert_ffn_ref", "isas"]
