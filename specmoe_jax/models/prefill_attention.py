"""Attention of one chunk of prompts on the accelerator, over the keys and values of the chunks before it."""

import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.models.attention import gate_of, gated
from specmoe_jax.models.selection import attention as selection
from specmoe_jax.models.selection import handed
from specmoe_jax.models.selection.indexer import asked_of, selects


def attend_chunk(config: AttentionConfig, q, k, v, sinks, k_rows, v_rows, lengths, num_new):
    """`ops.prefill_attention` of a layer, over staged rows [B, K, S, cache_dim]. -> attended, as attention.attend, and the rows."""
    q, asked = asked_of(config, q)
    q, gate = gate_of(config, q)
    missing = config.cache_dim - config.head_dim
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, missing))) for a in (q, k, v))
    if selects(config, k_rows.shape[2]):
        return selection.attend(config, q, asked, k, v, k_rows, v_rows, lengths, num_new)
    options = {"sinks": sinks, "scale": config.scale, "window": config.window, "chunk": config.chunk}
    out, *rows = ops.prefill_attention(q, k, v, k_rows, v_rows, lengths, num_new, **options)
    return handed.told(config, gated(out[..., : config.head_dim], gate), None), *rows
