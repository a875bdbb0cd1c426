"""The encoder's pass, once per batch: its experts cross the link like all others, and only the cross-attention cache remains."""

import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.protocol import PooledFlowExecutor
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.encoder import cross_caches
from specmoe_jax.types import CrossCache


def encode(
    flow: PooledFlowExecutor, runtime: Runtime, memory: ExpertMemory, sources: list[tuple[int, ...]], positions: int
) -> tuple[ExpertMemory, tuple[CrossCache, ...]]:
    """What the decoder layers attend of the sources: B token tuples, ragged; an empty one is a padding row.

    positions: S, to which all are padded. The whole batch at once, so that each expert is fetched once per layer.
    """
    tokens = np.zeros((len(sources), positions), np.int32)
    for row, source in enumerate(sources):
        tokens[row, : len(source)] = source
    lengths = jnp.array([len(source) for source in sources], jnp.int32)
    h = stages.embed(runtime.config.embedding, runtime.weights.outer, tokens, np.zeros(len(sources), np.int32))
    assert runtime.config.encoder is not None and runtime.weights.encoder is not None
    for i, (config, weights) in enumerate(zip(runtime.config.encoder.layers, runtime.weights.encoder.layers, strict=True)):
        h, x, routing = stages.encoder_attention(config, weights, h, lengths)
        if routing is not None:
            moe = runtime.config.expert_layers.index(runtime.config.num_layers + i)
            h, memory = flow.encoder_experts(runtime, moe, memory, h, x, routing)
    return memory, cross_caches(runtime.config, runtime.weights, h, lengths)
