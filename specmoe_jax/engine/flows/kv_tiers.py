"""Where attention runs: beside the experts on the accelerator, or on the CPU that holds the KV cache."""

import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows import resident_programs
from specmoe_jax.engine.flows.layer_passes import as_arrays, embed, finished
from specmoe_jax.engine.flows.protocol import Attended, ResidentPass, Unfinished
from specmoe_jax.engine.rows import split_of
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.speculate.drafts.protocol import TokenChoice
from specmoe_jax.speculate.drafts.self_draft import feed_back
from specmoe_jax.support.processes import put
from specmoe_jax.types import KVCache, Place, Tree


class AcceleratorKv:
    """The cache is on the accelerator. See protocol.KvTierExecutor."""

    def place(self, runtime: Runtime) -> Place:
        return runtime.context.place

    def beside_cache(self, runtime: Runtime, arrays):
        return arrays

    def attention(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, tree: Tree | None = None):
        """One program, with the experts of the layer before."""
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        rest, split = (weights, kv.k[layer], kv.v[layer], lengths, num_new, cross, tree), split_of(kv.k[layer])
        if isinstance(h, Unfinished):
            before, *experts = h
            return Attended(*stages.experts_and_attention(before, config, *experts, *rest, split=split))
        weights, *rest = rest
        return Attended(h, *stages.attention(config, weights, h, *rest, split=split))

    def resident_layer(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        """One program."""
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        given = (weights, h, kv.k[layer], kv.v[layer], lengths, num_new, pool, slots, cross, tree)
        return stages.layer(config, *given, split=split_of(kv.k[layer]))

    def resident_pass(self, runtime: Runtime, tokens, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        """One program for every few layers."""
        config, split = runtime.config, split_of(kv.k)
        h = embed(runtime, tokens, lengths, tree, split=split)
        keys, values, inputs, routed, done = (), (), {}, (), 0
        for group in resident_programs.groups(len(config.layers)):
            watched = [layer for layer in runtime.feature_layers if group.start <= layer < group.stop]
            own = slots[done : done + sum(moe is not None for moe in config.moe_index[group])]
            h, seen, k, v, told = resident_programs.run_layers(
                config.layers[group],
                tuple(layer - group.start for layer in watched),
                runtime.routing is not None,
                runtime.weights.layers[group],
                h,
                kv.k[group],
                kv.v[group],
                lengths,
                num_new,
                pool,
                own,
                kv.cross and kv.cross[group],
                tree,
                split=split,
            )
            keys, values, routed, done = keys + k, values + v, routed + told, done + len(own)
            inputs |= dict(zip(watched, seen, strict=True))
        return ResidentPass(h=h, kv=kv._replace(k=keys, v=values), inputs=inputs, routed=routed)

    def draft_forward(self, runtime: Runtime, tokens, kv: KVCache, lengths, num_new, pool, slots):
        """One program."""
        given = (runtime.weights, kv.k, kv.v, kv.cross, pool, _together(slots), tokens, lengths, num_new)
        logits, choices, k, v = resident_programs.draft_forward(runtime.config, *given, split=split_of(kv.k))
        return logits, kv._replace(k=k, v=v), choices

    def draft_chain(self, runtime: Runtime, token, kv: KVCache, lengths, num_new, pool, slots, choice: TokenChoice, length: int):
        """One program, the same for all lengths."""
        most, slots = runtime.plan.draft_length, _together(slots)
        assert most is not None  # there is a draft
        tokens, probs, k, v, choices = resident_programs.draft_chain(
            runtime.config,
            most,
            runtime.plan.foresees,
            runtime.weights,
            kv.k,
            kv.v,
            kv.cross,
            pool,
            slots,
            token,
            lengths,
            num_new,
            choice,
            np.int32(length),
            split=split_of(kv.k),
        )
        if length < most:
            tokens, probs = tokens[:, :length], None if probs is None else probs[:, :length]
        return tokens, probs, kv._replace(k=k, v=v), None if choices is None else choices[:length]


class HostKv:
    """The cache is in host memory: queries, keys and values cross the link to it, attention outputs back.

    See protocol.KvTierExecutor.
    """

    def place(self, runtime: Runtime) -> Place:
        return runtime.context.host

    def beside_cache(self, runtime: Runtime, arrays):
        return put(arrays, runtime.context.host)

    def attention(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, tree: Tree | None = None):
        config, weights, cross = runtime.config.layers[layer], runtime.weights.layers[layer], kv.cross and kv.cross[layer]
        if config.attention.recurrent is not None:  # its state is small and stays on the accelerator
            return ON_ACCELERATOR.attention(runtime, layer, h, kv, lengths, num_new, tree)
        h = before = finished(h)
        inputs = runtime.context.on_host(
            runtime.context.to_host((*stages.pre_attention(config, weights, h, lengths, tree), weights.sinks))
        )
        where = put((lengths, num_new, tree), runtime.context.host)
        attended, k_cache, v_cache = stages.attend(config, *inputs, kv.k[layer], kv.v[layer], *where)
        h, x, routing = stages.post_attention(config, weights, h, runtime.context.to_accelerator(attended), num_new, cross)
        return Attended(before, h, x, routing, k_cache, v_cache)

    def resident_layer(self, runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        _, h, x, routing, k, v = self.attention(runtime, layer, h, kv, lengths, num_new, tree)
        h = stages.resident_experts(runtime.config.layers[layer], runtime.weights.layers[layer], h, x, routing, pool, slots)
        return h, routing, k, v

    def resident_pass(self, runtime: Runtime, tokens, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
        return self._layers(runtime, tokens, kv, lengths, num_new, pool, slots, tree)

    def draft_forward(self, runtime: Runtime, tokens, kv: KVCache, lengths, num_new, pool, slots):
        done = self._layers(runtime, tokens[:, None], kv, lengths, num_new, pool, slots)
        logits = stages.head(runtime.config.head, runtime.weights.outer, done.h)[:, 0]
        return logits, done.kv, [routing.ids for routing in done.routed]

    def draft_chain(self, runtime: Runtime, token, kv: KVCache, lengths, num_new, pool, slots, choice: TokenChoice, length: int):
        """Token by token and layer by layer: the host attends in each."""

        choices = []

        def forward(kv: KVCache, tokens, lengths):
            tokens, lengths = as_arrays(tokens, lengths)
            logits, kv, chosen = self.draft_forward(runtime, tokens, kv, lengths, num_new, pool, slots)
            choices.append(chosen)
            return logits, kv

        return *feed_back(forward, kv, token, lengths, choice, length), choices if runtime.plan.foresees else None

    def _layers(
        self, runtime: Runtime, tokens, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None
    ) -> ResidentPass:
        h, keys, values, inputs, routed = embed(runtime, tokens, lengths, tree), [], [], {}, []
        for layer, moe in enumerate(runtime.config.moe_index):
            if layer in runtime.feature_layers:
                inputs[layer] = h
            own = None if moe is None else slots[moe]
            h, routing, k, v = self.resident_layer(runtime, layer, h, kv, lengths, num_new, pool, own, tree)
            keys.append(k)
            values.append(v)
            routed += [] if routing is None else [routing]
        return ResidentPass(h=h, kv=kv._replace(k=tuple(keys), v=tuple(values)), inputs=inputs, routed=tuple(routed))


def _together(slots):
    """One array for tables of slots [E] (an argument costs microseconds); what is more than that as it is."""
    return np.stack(slots) if all(isinstance(own, np.ndarray) for own in slots) else slots


ON_ACCELERATOR, ON_HOST = AcceleratorKv(), HostKv()
