"""What stays the same over all steps of an engine: weights on the accelerator, the store, the draft, the policies."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS, HOST_CACHE_POLICIES, KV_TIERS
from specmoe_jax.engine.drafts.protocol import DraftExecutor
from specmoe_jax.engine.flows.protocol import ExpertFlow, KvTier
from specmoe_jax.engine.state import PoolSlots
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import Weights
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.offload.stream_schedule import spread
from specmoe_jax.offload.tiers import DiskTier, HostTier, Tier
from specmoe_jax.ops import PackedCache, empty_cache
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount, arriving_experts
from specmoe_jax.speculate.drafts.protocol import Draft, FeatureDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy, keep_rule, make_policy
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
    flow: ExpertFlow["Runtime", Any]  # of a Session
    cache_tier: KvTier["Runtime"]
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
    expert_bytes: int  # of one expert on the link

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers whose inputs the draft takes; none for most drafts, nor for one of the last hidden state."""
        return self.draft.feature_layers if isinstance(self.draft, FeatureDraft) else ()

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
    draft_set: DraftSetPolicy | None = None,
    executor: DraftExecutor,
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
    flow = EXPERT_FLOWS.executor(plan.flow.name)
    policy = draft_set or make_policy(
        plan.draft_set or plan.drafting.default_draft_set, config.num_moe_layers, config.num_experts, guard=plan.guard
    )
    return Runtime(
        config=config,
        plan=plan,
        flow=flow,
        cache_tier=KV_TIERS.executor(plan.cache_tier.name),
        weights=jax.device_put(model.weights, device),
        store=ExpertStore(
            _tier(model, plan, account),
            Link(plan.link_bytes_per_s, oracle=plan.prefetch == "oracle"),
            room=0 if device == host else arriving_experts(account.expert_bytes, config.num_experts),
        ),
        draft=draft,
        executor=executor,
        draft_set=policy,
        keep=keep_rule(policy, pinned_experts(config, plan)),
        neighbours=found,
        resident_slots=flow.resident_slots(config),
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
        expert_bytes=account.expert_bytes,
    )


def _tier(model: Model, plan: Plan, account: MemoryAccount) -> Tier:
    if plan.expert_tier == "host":
        return HostTier(model.experts)
    return DiskTier(
        model.experts,
        capacity=account.host_experts,
        policy=HOST_CACHE_POLICIES.executor(plan.dram_policy or plan.flow.host_cache_policy),
        keep_pages=not plan.bypass_page_cache,
    )


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
