"""The encoder's pass, once per batch: its experts cross the link like all others, and nothing of it stays but the cross cache."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.layer_passes import execute_waves
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.encoder import cross_caches
from specmoe_jax.offload.residency import plan_layer
from specmoe_jax.types import CrossCache, Routing


def encode(
    runtime: Runtime, memory: ExpertMemory, sources: list[tuple[int, ...]], positions: int
) -> tuple[ExpertMemory, tuple[CrossCache, ...]]:
    """What the decoder layers attend of the sources: B token tuples, ragged; an empty one is a padding row.

    positions: S, to which all are padded. The whole batch at once, so that each expert is fetched once per layer.
    """
    tokens = np.zeros((len(sources), positions), np.int32)
    for row, source in enumerate(sources):
        tokens[row, : len(source)] = source
    lengths = jnp.array([len(source) for source in sources], jnp.int32)
    places = jnp.broadcast_to(jnp.arange(positions), tokens.shape)
    h = stages.embed(runtime.weights, tokens, places, config=runtime.config.embedding)
    for i, (config, weights) in enumerate(zip(runtime.config.encoder.layers, runtime.weights.encoder.layers, strict=True)):
        h, x, routing = stages.encoder_attention(config, weights, h, lengths)
        if routing is not None:
            moe = runtime.config.expert_layers.index(runtime.config.num_layers + i)
            h, memory = _experts(runtime, moe, memory, h, x, routing)
    return memory, cross_caches(runtime.config, runtime.weights, h, lengths)


def _experts(runtime: Runtime, moe: int, memory: ExpertMemory, h: jax.Array, x, routing: Routing) -> tuple[jax.Array, ExpertMemory]:
    """The experts of a layer, wave by wave in the slots that are free: a prompt asks for more than a step does."""
    config = runtime.config.all_layers[runtime.config.expert_layers[moe]]
    if runtime.plan.expert_flow == "resident":
        return stages.experts(config, h, x, routing, memory.pool, runtime.resident_slots[moe]), memory
    ids = np.asarray(routing.ids)
    needed = np.zeros(runtime.config.num_experts, bool)
    needed[ids[ids >= 0]] = True
    plan, residency = plan_layer(memory.residency, moe, needed, np.zeros_like(needed))
    return execute_waves(runtime, config, plan, memory._replace(residency=residency), h, x, routing)
