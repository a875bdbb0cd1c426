"""What stays the same over all steps of an engine: weights on the accelerator, the store, the draft, the policies."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import HOST_CACHE_POLICIES
from specmoe_jax.engine.drafts.protocol import DraftExecutor
from specmoe_jax.engine.state import Buffers, ExpertMemory, HostKV, PoolSlots
from specmoe_jax.kv_cache.page_table import Pages
from specmoe_jax.kv_cache.positions import KV_PAGE, staged_positions
from specmoe_jax.models.experts import block_bytes
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import Weights
from specmoe_jax.offload import retained_experts
from specmoe_jax.offload.residency import empty, plan_layer
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.offload.stream_schedule import spread
from specmoe_jax.offload.tiers import DiskTier, HostTier, Tier
from specmoe_jax.ops import PackedCache, empty_cache
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount, arriving_experts
from specmoe_jax.speculate.drafts.protocol import Draft, FeatureDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy, make_policy
from specmoe_jax.speculate.hot_experts.usage import hot_set
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import KVCache


class Workers(NamedTuple):
    """The workers of a streamed plan beside the engine's own thread, one thread each; they start with their first task.

    spans: where it is noted when each task ran, None where nobody wants to know.
    """

    cpu: concurrent.futures.ThreadPoolExecutor
    link: concurrent.futures.ThreadPoolExecutor
    spans: list[Span] | None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """draft, executor: what proposes tokens, and what the engine asks about it.

    keep: (layer, votes [E], counts [E], resident [E], resting) -> [E] bool, experts that stay after the layer's pass.
    neighbours: [L, E, E] int32 where residents stand in for others, else None. resident_slots: [L, E] int32 under the
    resident flow, else None; an encoder's layers last. slots: of the pools that are made for this account. merged_slots:
    [L, K] int32, further slots for a draft's own experts, None without any. host: the CPU. pinned_layers: whose experts
    stay beside a stream.
    """

    config: ModelConfig
    plan: Plan
    weights: Weights
    store: ExpertStore
    draft: Draft | None
    executor: DraftExecutor
    draft_set: DraftSetPolicy
    keep: Callable[..., np.ndarray]
    neighbours: np.ndarray | None
    resident_slots: np.ndarray | None
    slots: PoolSlots
    merged_slots: np.ndarray | None
    device: jax.Device
    host: jax.Device
    activations: Link  # counts what crosses between accelerator and host beside experts
    pinned_sharding: jax.sharding.Sharding  # pinned host memory, where hidden states wait between two layers
    workers: Workers
    pinned_layers: tuple[int, ...]

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers whose inputs the draft takes; none for most drafts, nor for one of the last hidden state."""
        return self.draft.feature_layers if isinstance(self.draft, FeatureDraft) else ()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert on the link."""
        return block_bytes(self.config.experts, self.plan.dtype)

    def to_host(self, arrays):
        """Starts the copy of activations into host memory; what is to compute with them there takes them through `on_host`.

        From an accelerator of its own they go to pinned memory, since a copy to the CPU device blocks this thread until the
        accelerator has come so far.
        """
        self.activations.send(sum(array.nbytes for array in jax.tree.leaves(arrays)))
        return jax.device_put(arrays, self.host if self.device == self.host else self.pinned_sharding)

    def on_host(self, arrays):
        """Arrays of `to_host` as arrays of the CPU that holds the KV cache; waits for them."""
        if self.device != self.host:  # the device alone would leave them in memory of the kind that they are in
            arrays = jax.device_put(arrays, jax.sharding.SingleDeviceSharding(self.host, memory_kind="device"))
        return jax.block_until_ready(arrays)

    def to_accelerator(self, array: jax.Array) -> jax.Array:
        """Copies attention outputs back."""
        self.activations.send(array.nbytes)
        return jax.device_put(array, self.device)


def build(
    model: Model,
    plan: Plan,
    account: MemoryAccount,
    draft: Draft | None,
    *,
    executor: DraftExecutor,
    draft_set: DraftSetPolicy | None,
    earlier: "Runtime | None",
    progress: str | bool,
    spans: list[Span] | None = None,
) -> Runtime:
    """The runtime of a plan whose account fits. Copies the weights (not the experts) to the accelerator.

    draft_set: a policy of the user's, None for the plan's.
    earlier: one of the same model and plan, whose neighbours need not be found again. progress: a bar while finding them.
    spans: see Lanes.
    """
    config, device, host = model.config, jax.devices()[0], jax.local_devices(backend="cpu")[0]
    # Maps experts, so before a tier drops pages.
    found = earlier.neighbours if earlier else executor.neighbours(model, plan, progress)
    resident = plan.expert_flow == "resident"
    policy = draft_set or make_policy(
        plan.draft_set or plan.drafting.default_draft_set, config.num_moe_layers, config.num_experts, guard=plan.guard
    )
    order = np.arange(config.num_expert_layers * config.num_experts, dtype=np.int32)
    return Runtime(
        config=config,
        plan=plan,
        weights=jax.device_put(model.weights, device),
        store=ExpertStore(
            _tier(model, plan, account),
            Link(plan.link_bytes_per_s, oracle=plan.prefetch == "oracle"),
            room=0 if device == host else arriving_experts(account.expert_bytes, config.num_experts),
        ),
        draft=draft,
        executor=executor,
        draft_set=policy,
        keep=_keep(config, plan, policy),
        neighbours=found,
        resident_slots=order.reshape(config.num_expert_layers, config.num_experts) if resident else None,
        slots=PoolSlots(
            total=account.num_slots,
            dispatch=account.dispatch_slots,
            single_wave=account.num_slots >= account.wanted_slots,
        ),
        merged_slots=_merged_slots(config, account) if account.merged_slots else None,
        device=device,
        host=host,
        activations=Link(),
        pinned_sharding=jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"),
        workers=Workers(*(concurrent.futures.ThreadPoolExecutor(1, f"specmoe-{worker}") for worker in ("cpu", "link")), spans),
        pinned_layers=spread(config.moe_layers, account.pinned_layers),
    )


def _tier(model: Model, plan: Plan, account: MemoryAccount) -> Tier:
    if plan.expert_tier == "host":
        return HostTier(model.experts)
    return DiskTier(
        model.experts,
        capacity=account.host_experts,
        policy=HOST_CACHE_POLICIES.executor(plan.dram_policy or ("mru" if plan.expert_flow == "stream" else "frequency")),
        keep_pages=not plan.bypass_page_cache,
    )


def first_memory(runtime: Runtime) -> ExpertMemory:
    """A new pool with what must always be there: all experts (resident flow) or a first draft set per layer that decodes."""
    shape = (runtime.config.num_expert_layers, runtime.config.num_experts)
    if runtime.plan.expert_flow == "stream":
        return ExpertMemory(
            slots=runtime.slots,
            pool=None,
            residency=empty(*shape, 0),
            usage_scores=np.zeros(shape),
            prefetched=np.zeros(shape, bool),
            buffers=_first_buffers(runtime),
        )
    pool = runtime.store.new_pool(runtime.slots.total + (0 if runtime.merged_slots is None else runtime.merged_slots.size))
    residency, none, arriving = empty(*shape, runtime.slots.total), np.zeros(shape[1], bool), ()
    usage_scores = np.zeros((runtime.config.num_moe_layers, shape[1]))
    retained = retained_experts.nothing(*shape, runtime.slots.total) if runtime.plan.retain else None
    for layer in range(runtime.config.num_expert_layers):
        decodes = layer < runtime.config.num_moe_layers
        keep = (
            runtime.keep(layer, usage_scores[layer], usage_scores[layer], none)
            if decodes
            else np.full(shape[1], runtime.resident_slots is not None)
        )
        plan, residency = plan_layer(residency, layer, none, keep)
        for wave in plan.waves:
            pool, arriving = runtime.store.fetch(pool, wave.fetch, arriving)
            retained = retained and retained_experts.after_copies(retained, wave.fetch)
    pool, _ = runtime.store.finish_copies(pool, arriving)
    return ExpertMemory(
        slots=runtime.slots,
        pool=pool,
        residency=residency,
        usage_scores=usage_scores,
        prefetched=np.zeros(shape, bool),
        retained_experts=retained,
    )


def _first_buffers(runtime: Runtime) -> Buffers:
    """The pinned layers, and the layer buffers: the first streamed layers are on their way into all but one of them."""
    store, index = runtime.store, runtime.config.moe_index
    # In the link's thread, as every stream: a disk tier has one caller, and an abandoned job's may still be at it.
    stay = [
        runtime.workers.link.submit(store.stream, store.new_buffer(), store.send_for(index[layer]))
        for layer in runtime.pinned_layers
    ]
    pinned = tuple(stream.result() for stream in stay)
    streamed = [moe for moe, layer in enumerate(runtime.config.moe_layers) if layer not in runtime.pinned_layers]
    if not streamed:
        return Buffers(spare=None, readers=(), coming=(), pinned=pinned)
    first = (streamed * runtime.plan.layer_buffers)[: runtime.plan.layer_buffers - 1]  # a model of one layer has two buffers too
    coming = tuple(runtime.workers.link.submit(store.stream, store.new_buffer(), store.send_for(moe)) for moe in first)
    return Buffers(spare=store.new_buffer(), readers=(), coming=coming, pinned=pinned)


def new_host_kv(runtime: Runtime, pages: Pages, chunk: int) -> HostKV:
    """A paged cache of zeros in host memory, in the plan's dtype."""
    # A chunk below the plan's is as long as the longest prompt.
    staged = chunk if chunk < runtime.plan.prefill_chunk else staged_positions(pages.table.shape[1] * KV_PAGE, chunk)
    caches = (empty_pages(layer.attention, len(pages.free), runtime.plan.dtype, runtime.host) for layer in runtime.config.layers)
    return HostKV(caches=tuple(caches), pages=pages, chunk=chunk, staged=staged)


def empty_pages(attention: AttentionConfig, count: int, dtype, device: jax.Device) -> PackedCache:
    """Pages of zeros of one layer."""
    with jax.default_device(device):  # else they are made on the accelerator, where they may not fit
        pages = empty_cache(count, attention.num_kv_heads, KV_PAGE, attention.cache_dim, dtype)
    return jax.device_put(pages, device)


def new_cache(config: ModelConfig, rows: int, positions: int, dtype: str, device: jax.Device) -> KVCache:
    """A KV cache of zeros."""

    def buffer(layer: LayerConfig) -> jax.Array:
        shape = (rows, layer.attention.num_kv_heads, positions, layer.attention.cache_dim)
        with jax.default_device(device):  # zeros(device=...) makes them on the default device and copies
            return jax.device_put(jnp.zeros(shape, dtype), device)

    return KVCache(k=tuple(map(buffer, config.layers)), v=tuple(map(buffer, config.layers)))


def _merged_slots(config: ModelConfig, account: MemoryAccount) -> np.ndarray:
    """[L, K]: behind those that the residency plans know of."""
    return account.num_slots + np.arange(account.merged_slots, dtype=np.int32).reshape(config.num_moe_layers, -1)


def _keep(config: ModelConfig, plan: Plan, policy: DraftSetPolicy):
    """The best experts of a layer by the policy's scores, as many as the plan pins; N = 0 keeps nothing (OnDemand)."""
    sizes = pinned_experts(config, plan)

    def keep(layer: int, usage_scores: np.ndarray, counts: np.ndarray, resident: np.ndarray, resting: bool = False) -> np.ndarray:
        scores = policy.resting if resting and policy.resting else policy.scores
        return hot_set(scores(usage_scores, counts, layer), resident, sizes[layer])

    return keep
