"""Passes through all layers: the target's, which brings every expert it needs, and the draft's, which brings none."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.engine import stages
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scheduler import PromptChunk
from specmoe_jax.engine.state import ExpertMemory, HostKV, PassInfo
from specmoe_jax.offload import retained_experts
from specmoe_jax.offload.residency import LayerPlan, plan_layer, plan_prefetch
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.types import KVCache, Routing, Tree

NO_SLOTS = np.zeros(0, np.int32)


class TargetPass(NamedTuple):
    """h: [B, T, M] after the last layer, None if all rows only joined. counts: [L, E] int64, how often each expert was chosen.

    features: [B, T, M'], what the draft takes of the hidden states; None where it takes nothing. prompts: of a streamed pass,
    the chunks that joined and their features.
    """

    h: jax.Array | None
    kv: KVCache | HostKV
    memory: ExpertMemory
    counts: np.ndarray
    info: PassInfo
    features: jax.Array | None = None
    prompts: tuple[tuple[PromptChunk, jax.Array], ...] = ()


class LayerInfo(NamedTuple):
    """What one layer of a pass did: its plan, its routing ids [n, A], and what it prefetched for later layers."""

    plan: LayerPlan
    ids: np.ndarray
    counts: np.ndarray
    prefetched: int
    prefetch_hits: int


def target_pass(
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
) -> TargetPass:
    """The exact model over tokens [B, T] at positions lengths[b] + t, or + depth in a tree; rows t >= num_new[b] are padding.

    earlier: [L, E], choices of the earlier chunks of the same prefill. predicted: [L, E], choices that are
    expected of this pass (0 = none), worth a prefetch. kv and the memory's pool are consumed.
    """
    lengths, num_new = jnp.asarray(lengths), jnp.asarray(num_new)
    h = embed(runtime, tokens, lengths, tree)
    keys, values, infos, inputs = [], [], [], {}
    for layer, moe in enumerate(runtime.config.moe_index):
        if layer in runtime.feature_layers:
            inputs[layer] = h
        if moe is None or runtime.plan.expert_flow == "resident":
            slots = None if moe is None else runtime.resident_slots[moe]
            h, _, k, v = resident_layer(runtime, layer, h, kv, lengths, num_new, memory.pool, slots, tree)
        else:
            h, x, routing, k, v = attention(runtime, layer, h, kv, lengths, num_new, tree)
            h, memory, info = migrate_and_compute(runtime, moe, memory, h, x, routing, earlier[moe], predicted)
            infos.append(info)
        keys.append(k)
        values.append(v)
    return TargetPass(
        h=h,
        kv=kv._replace(k=tuple(keys), v=tuple(values)),
        memory=memory,
        counts=np.stack([info.counts for info in infos]) if infos else earlier,
        info=_pass_info(infos, tokens.shape),
        features=features(runtime, h, inputs),
    )


def features(runtime: Runtime, h: jax.Array, inputs: dict[int, jax.Array]) -> jax.Array | None:
    """What a FeatureDraft takes of a pass. h [B, T, M] after the last layer; inputs: those of `runtime.feature_layers`."""
    if not isinstance(runtime.draft, FeatureDraft):
        return None
    if not runtime.feature_layers:
        return stages.final_norm(runtime.config.norm_eps, runtime.weights, h)
    return jnp.concatenate([inputs[layer] for layer in runtime.feature_layers], axis=-1)


def embed(runtime: Runtime, tokens, lengths: jax.Array, tree: Tree | None = None) -> jax.Array:
    """tokens [B, T] at positions lengths[b] + t, or + depth in a tree -> [B, T, M]."""
    if runtime.config.embedding is None:
        return stages.embed(runtime.weights, tokens)
    depths = jnp.arange(tokens.shape[1]) if tree is None else tree.depths
    return stages.embed(runtime.weights, tokens, lengths[:, None] + depths, config=runtime.config.embedding)


def migrate_and_compute(
    runtime: Runtime, moe: int, memory: ExpertMemory, h, x, routing: Routing, earlier: np.ndarray, predicted: np.ndarray
) -> tuple[jax.Array, ExpertMemory, LayerInfo]:
    """Fetches what the moe-th layer with experts needs for its routing and computes its experts, wave by wave.

    While its own misses travel, the link is also given the predicted misses of the layers after it, and the disk
    those that are not in host memory.
    """
    ids = np.asarray(routing.ids)  # the host waits here: only now is known what must be fetched
    counts = earlier + count_choices(ids, runtime.config.num_experts)
    needed = np.zeros(runtime.config.num_experts, bool)
    needed[ids[ids >= 0]] = True
    # What is resident on a guess must not win the ties of the draft set: it costs acceptance (3.6 -> 2.9 tokens per step).
    established = (memory.residency.slot_of[moe] >= 0) & ~memory.prefetched[moe]
    keep = runtime.keep(moe, memory.usage_scores[moe], counts, established, memory.resting)
    memory, eviction_priority = _revive(memory, moe, needed | keep, counts)
    plan, residency = plan_layer(memory.residency, moe, needed, keep, eviction_priority)
    hits = int((memory.prefetched[moe] & needed).sum())
    prefetched = memory.prefetched.copy()
    prefetched[moe] = False
    memory = memory._replace(residency=residency, prefetched=prefetched)
    h, memory, ahead = execute(runtime, moe, plan, memory, h, x, routing, predicted)
    return h, memory, LayerInfo(plan=plan, ids=ids, counts=counts, prefetched=ahead, prefetch_hits=hits)


def execute(
    runtime: Runtime, moe: int, plan: LayerPlan, memory: ExpertMemory, h, x, routing: Routing, predicted: np.ndarray
) -> tuple[jax.Array, ExpertMemory, int]:
    """Does what the plan says: per wave, copies and then the experts. -> h, memory, experts prefetched.

    Which of the two forms runs is fixed by the memory account, so that nothing compiles after warm-up.
    """
    config = runtime.config.layers[runtime.config.moe_layers[moe]]
    if memory.slots.single_wave:
        (wave,) = plan.waves
        memory = _fetch(runtime, memory, wave.fetch)
        memory, ahead = prefetch(runtime, memory, predicted, first_layer=moe + 1, in_use=wave.slots)
        memory = wait_for_copies(runtime, memory, wave.slots)
        return stages.experts(config, h, x, routing, memory.pool, wave.slots), memory, ahead
    return *execute_waves(runtime, config, plan, memory, h, x, routing), 0


def execute_waves(runtime: Runtime, config: LayerConfig, plan: LayerPlan, memory: ExpertMemory, h, x, routing: Routing):
    """Any number of waves, by one program. -> h, memory."""
    outputs = jnp.zeros((*routing.ids.shape, x.shape[-1]), jnp.float32, device=runtime.device)
    for wave in plan.waves:
        memory = _fetch(runtime, memory, wave.fetch)
        memory = wait_for_copies(runtime, memory, wave.slots)
        outputs = stages.experts_wave(config, outputs, x, routing.ids, memory.pool, wave.slots)
    return stages.combine(h, outputs, routing), memory


def _fetch(runtime: Runtime, memory: ExpertMemory, copies) -> ExpertMemory:
    """Starts the copies (layer, expert, slot)."""
    retained = memory.retained_experts and retained_experts.after_copies(memory.retained_experts, copies)
    pool, arriving = runtime.store.fetch(memory.pool, copies, memory.arriving)
    return memory._replace(pool=pool, arriving=arriving, retained_experts=retained)


def wait_for_copies(runtime: Runtime, memory: ExpertMemory, slots: np.ndarray | None = None) -> ExpertMemory:
    """With what was sent for in the pool: that of these slots (None: all). Waits for it."""
    pool, arriving = runtime.store.finish_copies(memory.pool, memory.arriving, slots)
    return memory._replace(pool=pool, arriving=arriving)


def _revive(memory: ExpertMemory, moe: int, wanted: np.ndarray, counts: np.ndarray) -> tuple[ExpertMemory, np.ndarray | None]:
    """Takes wanted experts [E] of a layer with experts out of free slots. -> memory, the order in which slots are overwritten."""
    if memory.retained_experts is None:
        return memory, None
    retained = retained_experts.after_pass(memory.retained_experts, moe, counts)
    of_layer = np.zeros(retained.usage.shape, bool)
    of_layer[moe] = wanted
    residency = retained_experts.revive(memory.residency, retained, of_layer, room=len(retained.holds))
    return memory._replace(residency=residency, retained_experts=retained), retained_experts.eviction_priority(retained)


def prefetch(
    runtime: Runtime,
    memory: ExpertMemory,
    predicted: np.ndarray,
    *,
    first_layer: int,
    in_use: np.ndarray = NO_SLOTS,
    budget_s: float = float("inf"),
) -> tuple[ExpertMemory, int]:
    """Starts copies of predicted experts of layers >= first_layer into spare slots. -> memory, experts copied.

    in_use: slots that the next computation reads. budget_s: seconds that the link may be busy from now on (known
    for an emulated link only).
    """
    if runtime.plan.prefetch != "draft":
        return memory, 0
    ahead = np.zeros(memory.prefetched.shape, predicted.dtype)
    ahead[first_layer : len(predicted)] = predicted[first_layer:]
    pool, arriving = runtime.store.finish_arrived(memory.pool, memory.arriving)
    memory = memory._replace(pool=pool, arriving=arriving)
    limit, residency, retained = runtime.store.copies_within(budget_s, len(arriving)), memory.residency, memory.retained_experts
    if retained is not None:
        room = int((residency.owner < 0).sum()) - memory.slots.dispatch
        residency = retained_experts.revive(residency, retained, ahead > 0, room)
    runtime.store.tier.read_ahead(np.where(residency.slot_of < 0, ahead, 0))
    copies, residency = plan_prefetch(
        residency,
        np.where(runtime.store.tier.ready(), ahead, 0),
        reserve=memory.slots.dispatch,
        limit=limit,
        in_use=in_use,
        eviction_priority=None if retained is None else retained_experts.eviction_priority(retained),
    )
    prefetched = memory.prefetched.copy()
    for layer, expert, _ in copies:
        prefetched[layer, expert] = True
    return _fetch(runtime, memory._replace(residency=residency, prefetched=prefetched), copies), len(copies)


def draft_forward(
    runtime: Runtime, pool, slots, kv: KVCache, tokens, lengths, active
) -> tuple[jax.Array, KVCache, list[jax.Array]]:
    """One token per row through resident experts only. tokens [B]; slots: per layer, how to substitute.

    -> logits [B, V], kv, and per layer with experts those [B, A] that the router chose, resident or not.
    """
    lengths, num_new = jnp.asarray(lengths), jnp.asarray(active, jnp.int32)
    h = embed(runtime, jnp.asarray(tokens)[:, None], lengths)
    keys, values, choices = [], [], []
    for layer, moe in enumerate(runtime.config.moe_index):
        h, ids, k, v = resident_layer(runtime, layer, h, kv, lengths, num_new, pool, None if moe is None else slots[moe])
        keys.append(k)
        values.append(v)
        choices += [] if moe is None else [ids]
    return stages.head(runtime.config.norm_eps, runtime.weights, h)[:, 0], kv._replace(k=tuple(keys), v=tuple(values)), choices


def resident_layer(runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, pool, slots, tree: Tree | None = None):
    """A layer that needs no copy of an expert, or has none (slots None). One program with an accelerator cache.

    -> h, ids (None without experts), k, v.
    """
    config = runtime.config.layers[layer]
    if runtime.plan.kv_tier == "accelerator":
        weights = runtime.weights.layers[layer]
        cross = kv.cross_of(layer)
        return stages.layer(config, weights, h, kv.k[layer], kv.v[layer], lengths, num_new, pool, slots, cross, tree)
    h, x, routing, k, v = attention(runtime, layer, h, kv, lengths, num_new, tree)
    h = stages.resident_experts(config, runtime.weights.layers[layer], h, x, routing, pool, slots)
    return h, routing and routing.ids, k, v


def attention(runtime: Runtime, layer: int, h, kv: KVCache, lengths, num_new, tree: Tree | None = None):
    """Everything of a layer before its experts, with the cache where the plan keeps it. -> h, x, routing, k, v."""
    config, weights, k_cache, v_cache = runtime.config.layers[layer], runtime.weights.layers[layer], kv.k[layer], kv.v[layer]
    if runtime.plan.kv_tier == "accelerator":
        return stages.attention(config, weights, h, k_cache, v_cache, lengths, num_new, kv.cross_of(layer), tree)
    inputs = runtime.on_host(runtime.to_host((*stages.pre_attention(config, weights, h, lengths, tree), weights.sinks)))
    where = jax.device_put((lengths, num_new, tree), runtime.host)
    attended, k_cache, v_cache = stages.attend(config, *inputs, k_cache, v_cache, *where)
    h, x, routing = stages.post_attention(config, weights, h, runtime.to_accelerator(attended), num_new, kv.cross_of(layer))
    return h, x, routing, k_cache, v_cache


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
