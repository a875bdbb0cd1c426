"""What stays the same over all steps of an engine: weights on the accelerator, the store, the draft, the policies."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.checkpoints.disk import mapped
from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig, Recurrence
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS, HOST_CACHE_POLICIES, KV_TIERS
from specmoe_jax.engine.context import DeviceContext, first_of, make_context
from specmoe_jax.engine.drafts.executors import executor_of
from specmoe_jax.engine.drafts.protocol import DraftExecutor
from specmoe_jax.engine.flows.protocol import ExpertFlowExecutor, KvTierExecutor
from specmoe_jax.engine.rows import place_of_rows
from specmoe_jax.engine.state import PoolSlots
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import Weights
from specmoe_jax.offload.homes import homes_of, loads_of, slots_behind
from specmoe_jax.offload.sharded_store import ShardedStore
from specmoe_jax.offload.store import ExpertStore, Link, Store
from specmoe_jax.offload.stream_schedule import spread
from specmoe_jax.offload.tiers import DiskTier, HostTier, Tier, block_addresses
from specmoe_jax.ops import PackedCache, empty_cache
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount, arriving_experts
from specmoe_jax.speculate.drafts.protocol import Draft, FeatureDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy, keep_rule, make_policy
from specmoe_jax.support.processes import put
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import Device, KVCache, Place, RecurrentState


class ExpertPlaces(NamedTuple):
    """Where experts come from and the slots that they go to.

    resident_slots: [L, E] int32 where all stay for good, else None; an encoder's layers last. slots: of the pools made
    for this account. merged_slots: [L, K] int32, those among them for a draft's own experts, None without any. pinned_layers: whose
    experts stay beside a stream. expert_bytes: of one expert on the link. addresses: of each layer's blocks in host memory, on the
    CPU, [L] of [E, 2] uint32, where the host's cores compute some; else None. homes: [L, E] int32, the device of each expert.
    """

    store: Store
    slots: PoolSlots
    resident_slots: np.ndarray | None
    merged_slots: np.ndarray | None
    pinned_layers: tuple[int, ...]
    expert_bytes: int
    homes: np.ndarray
    addresses: tuple[jax.Array, ...] | None = None


class Policies(NamedTuple):
    """Which experts stay, and which stand in for others.

    keep: (layer, usage scores [E], counts [E], resident [E], resting) -> [E] bool, experts that stay after the layer's pass.
    neighbours: [L, E, E] int32 where residents stand in for others, else None.
    """

    draft_set: DraftSetPolicy
    keep: Callable[..., np.ndarray]
    neighbours: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """draft, draft_executor: what proposes tokens, and what the engine asks about it. flow: of a Session.

    watched: layers whose inputs a pass gives where it only reads, None where it gives what the draft takes. routing: "ids" or
    "weights" where passes tell what their routers decided, which some flows do not do by themselves; else None.
    """

    config: ModelConfig
    plan: Plan
    flow: ExpertFlowExecutor["Runtime", Any]
    cache_tier: KvTierExecutor["Runtime"]
    weights: Weights[jax.Array]
    draft: Draft | None
    draft_executor: DraftExecutor
    context: DeviceContext
    experts: ExpertPlaces
    policies: Policies
    watched: tuple[int, ...] | None = None
    routing: str | None = None

    @functools.cached_property  # a protocol's isinstance takes 15 us, as the next
    def gives_features(self) -> bool:
        """Whether a pass gives hidden states beside its last ones."""
        return bool(self.watched) if self.watched is not None else isinstance(self.draft, FeatureDraft)

    @functools.cached_property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers whose inputs are watched; none for most drafts, nor for one of the last hidden state."""
        if self.watched is not None:
            return self.watched
        return self.draft.feature_layers if isinstance(self.draft, FeatureDraft) else ()

    @property
    def feature_draft(self) -> FeatureDraft:
        """The draft, where a pass gives features."""
        assert isinstance(self.draft, FeatureDraft)
        return self.draft


def build(
    model: Model,
    plan: Plan,
    account: MemoryAccount,
    draft: Draft | None,
    *,
    draft_set: DraftSetPolicy | None = None,
    earlier: "Runtime | None" = None,
    progress: str | bool,
    spans: list[Span] | None = None,
    routing: str | None = None,
    popularity: np.ndarray | None = None,
) -> Runtime:
    """The runtime of a plan whose account fits. Copies the weights (not the experts) to the accelerator.

    draft_set: a custom policy, None for the plan's.
    earlier: one of the same model and plan, whose neighbours need not be found again. progress: a bar while finding them.
    spans: see Workers. routing: see Runtime. popularity: see Engine.
    """
    homes = plan_homes(model.config, plan, popularity)
    context, flow, executor = make_context(spans, plan.devices), EXPERT_FLOWS.executor(plan.flow.name), executor_of(plan)
    policies = _policies(model, plan, homes, draft_set, executor, earlier, progress)  # map experts, so before a tier drops pages
    return Runtime(
        config=model.config,
        plan=plan,
        flow=flow,
        cache_tier=KV_TIERS.executor(plan.cache_tier.name),
        weights=put(model.weights, context.place),
        draft=draft,
        draft_executor=executor,
        context=context,
        experts=_expert_places(model, plan, account, context, homes, flow.resident_slots(model.config, plan.devices)),
        policies=policies,
        routing=routing,
    )


def _policies(
    model: Model,
    plan: Plan,
    homes: np.ndarray,
    draft_set: DraftSetPolicy | None,
    executor: DraftExecutor,
    earlier: Runtime | None,
    progress: str | bool,
) -> Policies:
    config, name = model.config, plan.draft_set or plan.drafting.default_draft_set
    policy = draft_set or make_policy(name, config.num_moe_layers, config.num_experts, guard=plan.guard)
    return Policies(
        draft_set=policy,
        keep=keep_rule(policy, pinned_experts(config, plan), homes if plan.devices > 1 else None, plan.devices),
        neighbours=earlier.policies.neighbours if earlier else executor.neighbours(model, plan, progress),
    )


def plan_homes(config: ModelConfig, plan: Plan, popularity: np.ndarray | None) -> np.ndarray:
    """[L, E] int32, the device of each expert under a plan. popularity: see Engine."""
    tokens = plan.batch_size * plan.tokens_per_pass
    loads = None if popularity is None else loads_of(popularity, config.experts_per_token, tokens)
    return homes_of((config.num_expert_layers, config.num_experts), plan.devices, plan.placing, loads)


def _expert_places(
    model: Model,
    plan: Plan,
    account: MemoryAccount,
    context: DeviceContext,
    homes: np.ndarray,
    resident_slots: np.ndarray | None,
) -> ExpertPlaces:
    config, one = model.config, account.expert_bytes
    slots = PoolSlots(
        plan.devices * (account.num_slots + account.merged_slots),
        account.dispatch_slots,
        single_wave=account.num_slots >= account.wanted_slots,
    )
    store = _store(model, plan, account, context, homes)
    return ExpertPlaces(
        store=store,
        slots=slots,
        resident_slots=resident_slots,
        merged_slots=_merged_slots(config, plan, account) if account.merged_slots else None,
        pinned_layers=spread(config.moe_layers, account.pinned_layers),
        expert_bytes=one,
        homes=homes,
        addresses=None if plan.host_share is None else _addresses(config, store.tier, context.host),
    )


def _addresses(config: ModelConfig, tier: Tier, host: Device) -> tuple[jax.Array, ...]:
    """Of the blocks of every layer that decodes; the tier keeps them where they are."""
    keys = [[(layer, expert) for expert in range(config.num_experts)] for layer in range(config.num_moe_layers)]
    return tuple(jax.device_put(block_addresses(tier.blocks(of_layer)), host) for of_layer in keys)


def _store(model: Model, plan: Plan, account: MemoryAccount, context: DeviceContext, homes: np.ndarray) -> Store:
    """With a link of its own for every device."""
    links = [Link(plan.link_bytes_per_s, oracle=plan.prefetch == "oracle") for _ in context.devices]
    room = 0 if context.device == context.host else arriving_experts(account.expert_bytes, model.config.num_experts)
    if plan.devices == 1:
        return ExpertStore(_tier(model, plan, account, (), homes), links[0], room=room)
    return ShardedStore(_tier(model, plan, account, context.devices, homes), links, context.place.mesh, room=room)


def _tier(model: Model, plan: Plan, account: MemoryAccount, devices: tuple[Device, ...], homes: np.ndarray) -> Tier:
    if plan.expert_tier == "host":
        return HostTier(model.experts, devices, homes)
    if plan.flow.reads_pages(plan):
        return HostTier(mapped(model.experts), devices, homes)
    return DiskTier(
        model.experts,
        capacity=account.host_experts,
        policy=HOST_CACHE_POLICIES.executor(plan.dram_policy or plan.flow.host_cache_policy),
        keep_pages=not plan.bypass_page_cache,
        devices=devices,
        homes=homes,
    )


def empty_pages(attention: AttentionConfig, count: int, dtype, place: Place) -> PackedCache:
    """Pages of zeros of one layer."""
    with jax.default_device(first_of(place)):  # else they are made on the accelerator, where they may not fit
        pages = empty_cache(count, attention.num_kv_heads, KV_PAGE, attention.cache_dim, dtype)
    return put(pages, place)


def new_cache(config: ModelConfig, rows: int, positions: int, dtype: str, place: Place, *, replayed: int, states: Place) -> KVCache:
    """A KV cache of zeros. replayed: positions that may be rolled back, of which recurrent layers keep the rows.

    place: of several devices each gets its rows, where there are as many for each. states: where those of recurrent layers are, as
    of `new_states`, if the cache is in host memory; else they are divided as it is.
    """
    divided = place_of_rows(place, rows)
    states = divided if isinstance(place, jax.sharding.NamedSharding) else states

    def buffer(layer: LayerConfig) -> jax.Array:
        shape = (rows, layer.attention.num_kv_heads, positions, layer.attention.cache_dim)
        if divided != place:  # no device has it whole at any time
            return jnp.zeros(shape, dtype, device=divided)
        with jax.default_device(first_of(place)):  # zeros(device=...) makes them on the default device and copies
            return put(jnp.zeros(shape, dtype), place)

    def state(layer: LayerConfig) -> RecurrentState | None:
        recurrence = layer.attention.recurrent
        return None if recurrence is None else new_states(recurrence, rows, replayed, states)

    keys = tuple(state(layer) or buffer(layer) for layer in config.layers)
    values = tuple(() if layer.attention.recurrent else buffer(layer) for layer in config.layers)
    return KVCache(k=keys, v=values)


def new_states(config: Recurrence, rows: int, replayed: int, place: Place) -> RecurrentState:
    """Of a recurrent layer before any position. They are on the accelerator wherever the KV cache is; None: on the first device."""
    zeros = functools.partial(jnp.zeros, device=place or jax.local_devices()[0])
    return RecurrentState(
        state=zeros((rows, config.value_heads, config.key, config.value), jnp.float32),
        start=zeros(rows, jnp.int32),
        rows=zeros((rows, config.kept_rows(replayed), config.row), jnp.float32),
    )


def _merged_slots(config: ModelConfig, plan: Plan, account: MemoryAccount) -> np.ndarray:
    """[L, K]: on each device behind those that experts come and go in."""
    count = plan.drafting.merged_slots(plan, config)
    return slots_behind(count, plan.devices, account.num_slots).reshape(config.num_moe_layers, -1)
