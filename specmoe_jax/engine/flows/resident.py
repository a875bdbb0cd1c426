"""Every expert stays on the accelerator: a pass asks the host for nothing."""

import jax
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.layer_passes import as_arrays, features
from specmoe_jax.engine.flows.pooled import PooledFlowExecutor
from specmoe_jax.engine.flows.protocol import TargetPass
from specmoe_jax.engine.requests.routing import pass_routing
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, PassInfo
from specmoe_jax.offload.homes import whole_slots
from specmoe_jax.types import KVCache, Routing, Tree

NOTHING_FETCHED = PassInfo(hits=0, misses=0, fetched=0, waves=0, prefetched=0, prefetch_hits=0, routing=None)


class ResidentFlowExecutor(PooledFlowExecutor):
    def resident_slots(self, config: ModelConfig, devices: int = 1) -> np.ndarray:
        return whole_slots(config.num_expert_layers, devices, config.num_experts)

    def target_pass(
        self,
        runtime: Runtime,
        memory: ExpertMemory,
        kv: KVCache,
        tokens,
        lengths,
        num_new,
        *,
        earlier: np.ndarray,
        predicted: np.ndarray,
        tree: Tree | None = None,
    ) -> TargetPass[KVCache]:
        (lengths, num_new), stay = as_arrays(lengths, num_new), _slots(runtime)[: runtime.config.num_moe_layers]
        done = runtime.cache_tier.resident_pass(runtime, tokens, kv, lengths, num_new, memory.pool, stay, tree)
        return TargetPass(
            h=done.h,
            kv=done.kv,
            memory=memory,
            counts=earlier,
            info=NOTHING_FETCHED if runtime.routing is None else _told(runtime, done.routed, tokens.shape),
            features=features(runtime, done.h, done.inputs),
        )

    def encoder_experts(
        self, runtime: Runtime, moe: int, memory: ExpertMemory, h, x, routing: Routing
    ) -> tuple[jax.Array, ExpertMemory]:
        config = runtime.config.all_layers[runtime.config.expert_layers[moe]]
        return stages.experts(config, h, x, routing, memory.pool, _slots(runtime)[moe]), memory


def _told(runtime: Runtime, routed: tuple[Routing, ...], shape: tuple[int, int]) -> PassInfo:
    ids, weights = pass_routing(routed, shape, runtime.routing)
    return NOTHING_FETCHED._replace(routing=ids, routing_weights=weights)


def _slots(runtime: Runtime) -> np.ndarray:
    """[L, E], those in which the experts stay."""
    slots = runtime.experts.resident_slots
    assert slots is not None
    return slots


FLOW = ResidentFlowExecutor()
