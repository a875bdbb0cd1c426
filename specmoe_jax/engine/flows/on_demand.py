"""Experts are fetched when a router asks for them."""

from collections.abc import Sequence

import jax
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine import cache_rows
from specmoe_jax.engine.flows.layer_passes import as_arrays, embed, features, fetched, finished
from specmoe_jax.engine.flows.migration import LayerInfo, execute_waves, migrate_and_compute, needed_experts
from specmoe_jax.engine.flows.pooled import PooledFlowExecutor
from specmoe_jax.engine.flows.protocol import Chunk, TargetPass
from specmoe_jax.engine.rows import Split, place_of_rows, split_of
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, PassInfo, PassRouting
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.offload.residency import plan_layer
from specmoe_jax.types import KVCache, Routing, Tree


class OnDemandFlowExecutor(PooledFlowExecutor):
    def resident_slots(self, config: ModelConfig, devices: int = 1) -> None:
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
        lengths, num_new = as_arrays(lengths, num_new)
        h, watched, cache_tier = embed(runtime, tokens, lengths, tree, split_of(kv.k)), runtime.feature_layers, runtime.cache_tier
        keys, values, infos, inputs = [], [], [], {}
        for layer, moe in enumerate(runtime.config.moe_index):
            if moe is None:
                before = finished(h)
                h, _, k, v = cache_tier.resident_layer(runtime, layer, before, kv, lengths, num_new, memory.pool, None, tree)
            else:
                before, h, x, routing, k, v = cache_tier.attention(runtime, layer, h, kv, lengths, num_new, tree)
                assert routing is not None
                h, memory, info = migrate_and_compute(
                    runtime, moe, memory, h, x, routing, earlier[moe], predicted, host_share=runtime.plan.host_share
                )
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

    def prompt_pass(self, runtime: Runtime, memory: ExpertMemory, kv: KVCache, chunks: Sequence[Chunk], observe, on_positions):
        """Layer after layer, all chunks through each: what a layer needs crosses the link once for the whole prompts.

        Between two layers the chunks wait in host memory. Where the slots beside the pinned ones do not hold a layer, chunk after
        chunk.
        """
        if len(chunks) < 2 or memory.slots.dispatch < most_experts(runtime.plan.devices, runtime.config.num_experts):
            return super().prompt_pass(runtime, memory, kv, chunks, observe, on_positions)
        positions, layers = sum(int(chunk.num_new.max()) for chunk in chunks), runtime.config.num_layers
        passing = [_Passing(runtime, chunk, split_of(kv.k)) for chunk in chunks]
        totals = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), np.int64)
        for layer, moe in enumerate(runtime.config.moe_index):
            counts = np.zeros(runtime.config.num_experts, np.int64) if moe is None else totals[moe]
            for one in passing:
                memory, kv, counts = one.layer(layer, memory, kv, counts, more=one is not passing[-1])
            if moe is not None:
                totals[moe] = counts
            on_positions(positions * (layer + 1) // layers - positions * layer // layers)
        for one in passing:
            observe(one.chunk, one.features(), one.h, one.routing)
        return memory, kv, totals

    def encoder_experts(
        self, runtime: Runtime, moe: int, memory: ExpertMemory, h, x, routing: Routing
    ) -> tuple[jax.Array, ExpertMemory]:
        """Wave by wave in the slots that are free: a prompt asks for more than a step does."""
        config = runtime.config.all_layers[runtime.config.expert_layers[moe]]
        needed = needed_experts(np.asarray(routing.ids), runtime.config.num_experts)
        plan, residency = plan_layer(memory.residency, moe, needed, np.zeros_like(needed))
        return execute_waves(runtime, config, plan, memory._replace(residency=residency), h, x, routing)


class _Passing:
    """A chunk of the prompts on its way through the layers."""

    def __init__(self, runtime: Runtime, chunk: Chunk, split: Split):
        self.chunk, self._runtime, self._inputs = chunk, runtime, {}
        self._lengths, self._num_new = as_arrays(chunk.lengths, chunk.num_new)
        self._h = self._waiting(embed(runtime, chunk.tokens, self._lengths, split=split))
        self._nothing = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), np.int64)
        self._infos: list[LayerInfo] = []

    def layer(
        self, layer: int, memory: ExpertMemory, kv: KVCache, counts: np.ndarray, *, more: bool
    ) -> tuple[ExpertMemory, KVCache, np.ndarray]:
        """counts: [E], choices of the chunks before it; more: whether others follow. -> memory, kv, counts with its own."""
        runtime, moe = self._runtime, self._runtime.config.moe_index[layer]
        if layer in runtime.feature_layers:
            self._inputs[layer] = self._h
        h, where = fetched(self._h), (self._lengths, self._num_new)
        if moe is None:
            h, _, k, v = runtime.cache_tier.resident_layer(runtime, layer, h, kv, *where, memory.pool, None)
        else:
            _, h, x, routing, k, v = runtime.cache_tier.attention(runtime, layer, h, kv, *where)
            assert routing is not None
            h, memory, info = migrate_and_compute(runtime, moe, memory, h, x, routing, counts, self._nothing, more=more)
            h, counts = finished(h), counts + self.chunk.stands_for * (info.counts - counts)
            self._infos += [] if runtime.routing is None else [info]
        if self.chunk.spreads_row is not None:
            k, v = (cache_rows.spread_row(cache, np.int32(self.chunk.spreads_row)) for cache in (k, v))
        self._h = self._waiting(h)
        keys, values = (*kv.k[:layer], k, *kv.k[layer + 1 :]), (*kv.v[:layer], v, *kv.v[layer + 1 :])
        return memory, kv._replace(k=keys, v=values), counts

    @property
    def h(self) -> jax.Array:
        """What waits between two layers; after the last one, its output."""
        return self._h

    @property
    def routing(self) -> PassRouting | None:
        """Of all layers, after the last one, where the runtime tells it."""
        return _routing(self._infos, self.chunk.tokens.shape)

    def features(self) -> jax.Array | None:
        """What the draft takes, after the last layer."""
        return features(self._runtime, fetched(self._h), {layer: fetched(h) for layer, h in self._inputs.items()})

    def _waiting(self, h: jax.Array) -> jax.Array:
        pinned = self._runtime.context.pinned_sharding
        return jax.device_put(h, pinned if split_of(h) is None else place_of_rows(pinned, len(h)))


def _routing(infos: list[LayerInfo], shape: tuple[int, int]) -> PassRouting | None:
    """Of a pass over [B, T] positions; None without experts."""
    if not infos:
        return None
    weights = [info.weights.reshape(*shape, -1) for info in infos if info.weights is not None]
    return PassRouting(np.stack([info.ids.reshape(*shape, -1) for info in infos]), np.stack(weights) if weights else None)


def _pass_info(infos: list[LayerInfo], shape: tuple[int, int]) -> PassInfo:
    told = _routing(infos, shape)
    return PassInfo(
        hits=sum(info.plan.hits for info in infos),
        misses=sum(info.plan.misses + info.on_host for info in infos),
        fetched=sum(info.plan.fetched for info in infos),
        waves=sum(len(info.plan.waves) for info in infos),
        prefetched=sum(info.prefetched for info in infos),
        prefetch_hits=sum(info.prefetch_hits for info in infos),
        routing=told and told.ids,
        routing_weights=told and told.weights,
        on_host=sum(info.on_host for info in infos),
    )


FLOW = OnDemandFlowExecutor()
