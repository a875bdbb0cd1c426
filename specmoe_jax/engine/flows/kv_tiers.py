"""Where attention runs: beside the experts on the accelerator, or on the CPU that holds the KV cache."""

import jax

from specmoe_jax.engine import stages
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.types import Device, KVCache, Tree


class AcceleratorKv:
    """The cache is on the accelerator. See protocol.KvTierExecutor."""

    def device(self, runtime: Runtime) -> Device:
        return runtime.context.device

    def beside_cache(self, runtime: Runtime, arrays):
        return arrays

    def attention(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, tree: Tree | None = None):
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        return stages.attention(config, weights, h, kv.k[layer], kv.v[layer], lengths, num_new, cross, tree)

    def resident_layer(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        """One program."""
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        return stages.layer(config, weights, h, kv.k[layer], kv.v[layer], lengths, num_new, pool, slots, cross, tree)


class HostKv:
    """The cache is in host memory: queries, keys and values cross the link to it, attention outputs back.

    See protocol.KvTierExecutor.
    """

    def device(self, runtime: Runtime) -> Device:
        return runtime.context.host

    def beside_cache(self, runtime: Runtime, arrays):
        return jax.device_put(arrays, runtime.context.host)

    def attention(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, tree: Tree | None = None):
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        inputs = runtime.context.on_host(
            runtime.context.to_host((*stages.pre_attention(config, weights, h, lengths, tree), weights.sinks))
        )
        where = jax.device_put((lengths, num_new, tree), runtime.context.host)
        attended, k_cache, v_cache = stages.attend(config, *inputs, kv.k[layer], kv.v[layer], *where)
        h, x, routing = stages.post_attention(config, weights, h, runtime.context.to_accelerator(attended), num_new, cross)
        return h, x, routing, k_cache, v_cache

    def resident_layer(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        h, x, routing, k, v = self.attention(runtime, layer, h, kv, lengths, num_new, tree)
        h = stages.resident_experts(runtime.config.layers[layer], runtime.weights.layers[layer], h, x, routing, pool, slots)
        return h, routing and routing.ids, k, v


ON_ACCELERATOR, ON_HOST = AcceleratorKv(), HostKv()
