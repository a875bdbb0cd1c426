"""Passes through all layers: the target's, which brings every expert it needs, and the draft's, which brings none."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, PassInfo
from specmoe_jax.offload.residency import LayerPlan, plan_layer
from specmoe_jax.speculate.hotness import count_choices
from specmoe_jax.types import KVCache, Routing


class TargetPass(NamedTuple):
    """h: [B, T, M] after the last layer. votes: [L, E] int64, how often each expert was chosen."""

    h: jax.Array
    kv: KVCache
    memory: ExpertMemory
    votes: np.ndarray
    info: PassInfo


def target_pass(
    rt: Runtime, memory: ExpertMemory, kv: KVCache, tokens, lengths, num_new, votes: np.ndarray
) -> TargetPass:
    """The exact model over tokens [B, T] at positions lengths[b] + t; rows t >= num_new[b] are padding.

    votes: [L, E], choices that count towards the next draft set beside those of this pass (zeros, or the
    earlier chunks of a prefill). kv and the memory's pool are consumed.
    """
    h, lengths, num_new = stages.embed(rt.weights, tokens), jnp.asarray(lengths), jnp.asarray(num_new)
    keys, values, plans, routings, all_votes = [], [], [], [], []
    for layer in range(rt.config.num_layers):
        if rt.plan.expert_flow == "resident":
            h, k, v = resident_layer(rt, layer, h, kv, lengths, num_new, memory.pool, rt.resident_slots[layer])
        else:
            h, x, routing, k, v = attention(rt, layer, h, kv, lengths, num_new)
            ids = np.asarray(routing.ids)  # the host waits here: only now is known what must be fetched
            counts = votes[layer] + count_choices(ids, rt.config.num_experts)
            h, memory, plan = migrate_and_compute(rt, layer, memory, h, x, routing, ids, counts)
            plans.append(plan)
            routings.append(ids.reshape(*h.shape[:2], -1))
            all_votes.append(counts)
        keys.append(k)
        values.append(v)
    return TargetPass(
        h=h,
        kv=KVCache(k=tuple(keys), v=tuple(values)),
        memory=memory,
        votes=np.stack(all_votes) if all_votes else votes,
        info=_pass_info(plans, routings),
    )


def migrate_and_compute(
    rt: Runtime, layer: int, memory: ExpertMemory, h, x, routing: Routing, ids: np.ndarray, counts: np.ndarray
) -> tuple[jax.Array, ExpertMemory, LayerPlan]:
    """Plans what layer `layer` must fetch for its routing, fetches it and computes its experts, wave by wave."""
    needed = np.zeros(rt.config.num_experts, bool)
    needed[ids[ids >= 0]] = True
    keep = rt.keep(layer, counts, memory.residency.slot_of[layer] >= 0)
    plan, residency = plan_layer(memory.residency, layer, needed, keep)
    h, pool = execute(rt, layer, plan, memory.pool, h, x, routing)
    return h, ExpertMemory(pool=pool, residency=residency), plan


def execute(rt: Runtime, layer: int, plan: LayerPlan, pool, h, x, routing: Routing) -> tuple[jax.Array, jax.Array]:
    """Does what the plan says: per wave, copies and then the experts. -> h, pool.

    Which of the two forms runs is fixed by the memory account, so that nothing compiles after warm-up.
    """
    if rt.single_wave:
        (wave,) = plan.waves
        pool = rt.store.fetch(pool, layer, wave)
        return stages.experts(h, x, routing, pool, wave.slots), pool
    outputs = jnp.zeros((*routing.ids.shape, x.shape[-1]), jnp.float32, device=rt.device)
    for wave in plan.waves:
        pool = rt.store.fetch(pool, layer, wave)
        outputs = stages.experts_wave(outputs, x, routing.ids, pool, wave.slots)
    return stages.combine(h, outputs, routing), pool


def draft_forward(rt: Runtime, pool, slots, kv: KVCache, tokens, lengths, active) -> tuple[jax.Array, KVCache]:
    """One token per row through resident experts only. tokens [B]; slots: L tables [E] -> logits [B, V], kv."""
    h = stages.embed(rt.weights, jnp.asarray(tokens)[:, None])
    lengths, num_new, keys, values = jnp.asarray(lengths), jnp.asarray(active, jnp.int32), [], []
    for layer in range(rt.config.num_layers):
        h, k, v = resident_layer(rt, layer, h, kv, lengths, num_new, pool, slots[layer])
        keys.append(k)
        values.append(v)
    return stages.head(rt.config, rt.weights, h)[:, 0], KVCache(k=tuple(keys), v=tuple(values))


def resident_layer(rt: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots):
    """A layer whose experts need no copy: one program where the cache is on the accelerator. -> h, k, v."""
    if rt.plan.kv_tier == "accelerator":
        weights = rt.weights.layers[layer]
        return stages.layer(rt.config, weights, h, kv.k[layer], kv.v[layer], lengths, num_new, pool, slots)
    h, x, routing, k, v = attention(rt, layer, h, kv, lengths, num_new)
    return stages.experts(h, x, routing, pool, slots), k, v


def attention(rt: Runtime, layer: int, h, kv: KVCache, lengths, num_new):
    """Everything of a layer before its experts, with the cache where the plan keeps it. -> h, x, routing, k, v."""
    weights, k_cache, v_cache = rt.weights.layers[layer], kv.k[layer], kv.v[layer]
    if rt.plan.kv_tier == "accelerator":
        return stages.attention(rt.config, weights, h, k_cache, v_cache, lengths, num_new)
    q, k, v = rt.to_host(stages.pre_attention(rt.config, weights, h, lengths))
    host_lengths, host_num_new = jax.device_put((lengths, num_new), rt.host)
    attended, k_cache, v_cache = stages.attend(rt.config, q, k, v, k_cache, v_cache, host_lengths, host_num_new)
    h, x, routing = stages.post_attention(rt.config, weights, h, rt.to_accelerator(attended), num_new)
    return h, x, routing, k_cache, v_cache


def _pass_info(plans: list[LayerPlan], routings: list[np.ndarray]) -> PassInfo:
    return PassInfo(
        hits=sum(plan.hits for plan in plans),
        misses=sum(plan.misses for plan in plans),
        fetched=sum(plan.fetched for plan in plans),
        waves=sum(len(plan.waves) for plan in plans),
        routing=np.stack(routings) if routings else None,
    )
