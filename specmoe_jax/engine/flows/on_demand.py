"""Experts are fetched when a router asks for them."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine.flows.layer_passes import embed, features, finished
from specmoe_jax.engine.flows.migration import LayerInfo, execute_waves, migrate_and_compute, needed_experts
from specmoe_jax.engine.flows.pooled import PooledFlowExecutor
from specmoe_jax.engine.flows.protocol import TargetPass
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, PassInfo
from specmoe_jax.offload.residency import plan_layer
from specmoe_jax.types import KVCache, Routing, Tree


class OnDemandFlowExecutor(PooledFlowExecutor):
    def resident_slots(self, config: ModelConfig) -> None:
        return None

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
        lengths, num_new = jnp.asarray(lengths), jnp.asarray(num_new)
        h, watched, cache_tier = embed(runtime, tokens, lengths, tree), runtime.feature_layers, runtime.cache_tier
        keys, values, infos, inputs = [], [], [], {}
        for layer, moe in enumerate(runtime.config.moe_index):
            if moe is None:
                before = finished(h)
                h, _, k, v = cache_tier.resident_layer(runtime, layer, before, kv, lengths, num_new, memory.pool, None, tree)
            else:
                before, h, x, routing, k, v = cache_tier.attention(runtime, layer, h, kv, lengths, num_new, tree)
                assert routing is not None
                h, memory, info = migrate_and_compute(runtime, moe, memory, h, x, routing, earlier[moe], predicted)
                infos.append(info)
            if layer in watched:
                inputs[layer] = before
            keys.append(k)
            values.append(v)
        h = finished(h)
        return TargetPass(
            h=h,
            kv=kv._replace(k=tuple(keys), v=tuple(values)),
            memory=memory,
            counts=np.stack([info.counts for info in infos]) if infos else earlier,
            info=_pass_info(infos, tokens.shape),
            features=features(runtime, h, inputs),
        )

    def encoder_experts(
        self, runtime: Runtime, moe: int, memory: ExpertMemory, h, x, routing: Routing
    ) -> tuple[jax.Array, ExpertMemory]:
        """Wave by wave in the slots that are free: a prompt asks for more than a step does."""
        config = runtime.config.all_layers[runtime.config.expert_layers[moe]]
        needed = needed_experts(np.asarray(routing.ids), runtime.config.num_experts)
        plan, residency = plan_layer(memory.residency, moe, needed, np.zeros_like(needed))
        return execute_waves(runtime, config, plan, memory._replace(residency=residency), h, x, routing)


def _pass_info(infos: list[LayerInfo], shape: tuple[int, int]) -> PassInfo:
    return PassInfo(
        hits=sum(info.plan.hits for info in infos),
        misses=sum(info.plan.misses for info in infos),
        fetched=sum(info.plan.fetched for info in infos),
        waves=sum(len(info.plan.waves) for info in infos),
        prefetched=sum(info.prefetched for info in infos),
        prefetch_hits=sum(info.prefetch_hits for info in infos),
        routing=np.stack([info.ids.reshape(*shape, -1) for info in infos]) if infos else None,
    )


FLOW = OnDemandFlowExecutor()
