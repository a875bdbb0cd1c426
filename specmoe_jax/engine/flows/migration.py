"""The migration of experts within one layer of a pass: copies, evictions, and the computation of experts once they have arrived."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.protocol import Unfinished
from specmoe_jax.engine.rows import place_of_rows, split_of
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.offload import retained_experts
from specmoe_jax.offload.host_share import computed_on_host
from specmoe_jax.offload.residency import LayerPlan, plan_layer, plan_prefetch
from specmoe_jax.offload.retained_experts import RetainedExperts
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.types import Pool, Routing

NO_SLOTS = np.zeros(0, np.int32)


class LayerInfo(NamedTuple):
    """What one layer of a pass did: its plan, its routing ids [n, A], and what it prefetched for later layers.

    weights: [n, A] of the routing, where the runtime tells them. on_host: absent experts that the host's cores computed.
    """

    plan: LayerPlan
    ids: np.ndarray
    counts: np.ndarray
    prefetched: int
    prefetch_hits: int
    weights: np.ndarray | None = None
    on_host: int = 0


def needed_experts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[E] bool: the experts among routing ids, -1 for padding."""
    needed = np.zeros(num_experts, bool)
    needed[ids[ids >= 0]] = True
    return needed


def migrate_and_compute(
    runtime: Runtime,
    moe: int,
    memory: ExpertMemory,
    h,
    x,
    routing: Routing,
    earlier: np.ndarray,
    predicted: np.ndarray,
    *,
    more: bool = False,
    host_share: float | None = None,
) -> tuple[jax.Array | Unfinished, ExpertMemory, LayerInfo]:
    """Fetches what the moe-th layer with experts needs for its routing and computes its experts, wave by wave.

    A single wave is left to the next layer's program; nothing is written into its slots before that.

    While its own misses travel, the link is also given the predicted misses of the layers after it, and the disk
    those that are not in host memory. more: whether further rows go through the layer before it chooses what stays; then all does.
    host_share: of the absent experts that do not stay, what the host's cores compute meanwhile; None: not asked.
    """
    ids = np.asarray(routing.ids)  # the host waits here: the routing decides which experts to fetch
    chosen = count_choices(ids, runtime.config.num_experts)
    needed, counts = chosen > 0, earlier + chosen
    # Speculatively prefetched experts lose ties in the draft set: winning them would cost acceptance.
    resident = memory.residency.slot_of[moe] >= 0
    established = resident & ~memory.prefetched[moe]
    keep = resident | needed
    if not more:
        keep = runtime.policies.keep(moe, memory.usage_scores[moe], counts, established, memory.resting)
    eviction_priority = None
    if memory.retained_experts is not None:
        memory, eviction_priority = _revive(memory, memory.retained_experts, moe, needed | keep, counts, predicted)
    on_host, elsewhere = np.zeros_like(needed), None
    if host_share is not None:
        on_host = computed_on_host(needed & ~keep & (memory.residency.slot_of[moe] < 0), chosen, host_share)
        elsewhere = start_on_host(runtime, moe, x, routing.ids, on_host)
    plan, residency = plan_layer(memory.residency, moe, needed & ~on_host, keep, eviction_priority)
    hits = int((memory.prefetched[moe] & needed).sum())
    prefetched = memory.prefetched.copy()
    prefetched[moe] = False
    memory = memory._replace(residency=residency, prefetched=prefetched)
    h, memory, ahead = execute(runtime, moe, plan, memory, h, x, routing, predicted, elsewhere)
    weights = np.asarray(routing.weights) if runtime.routing == "weights" else None
    info = LayerInfo(
        plan=plan,
        ids=ids,
        counts=counts,
        prefetched=ahead,
        prefetch_hits=hits,
        weights=weights,
        on_host=int(on_host.sum()),
    )
    return h, memory, info


def start_on_host(runtime: Runtime, moe: int, x: jax.Array, ids: jax.Array, on_host: np.ndarray) -> jax.Array:
    """Starts the experts [E] bool of a layer on the host's cores. -> outputs [n, A, M] there, zeros for all others.

    Runs also where there are none, so that it is compiled when it is wanted.
    """
    context, table = runtime.context, runtime.experts.addresses
    assert table is not None  # of a plan with a host share
    config = runtime.config.layers[runtime.config.moe_layers[moe]]
    here = np.where(on_host, np.arange(len(on_host), dtype=np.int32), -1)
    inputs = context.on_host(context.to_host((x, ids)))
    return stages.experts_on_host(config, *inputs, table[moe], jax.device_put(here, context.host))


def execute(
    runtime: Runtime,
    moe: int,
    plan: LayerPlan,
    memory: ExpertMemory,
    h,
    x,
    routing: Routing,
    predicted: np.ndarray,
    elsewhere: jax.Array | None = None,
) -> tuple[jax.Array | Unfinished, ExpertMemory, int]:
    """Executes the plan: per wave, copies and then the experts. -> h, memory, experts prefetched.

    elsewhere: outputs of experts that the host's cores compute meanwhile. Which of the forms runs is fixed by the plan and the
    memory account, so that nothing compiles after warm-up.
    """
    config = runtime.config.layers[runtime.config.moe_layers[moe]]
    if memory.slots.single_wave:
        (wave,) = plan.waves
        memory = _fetch(runtime, memory, wave.fetch)
        memory, ahead = prefetch(runtime, memory, predicted, first_layer=moe + 1, in_use=wave.slots)
        memory = wait_for_copies(runtime, memory, wave.slots)
        outputs = None if elsewhere is None else runtime.context.to_accelerator(elsewhere)
        return Unfinished(config, h, x, routing, _pool(memory), wave.slots, outputs), memory, ahead
    return *execute_waves(runtime, config, plan, memory, h, x, routing, elsewhere), 0


def execute_waves(
    runtime: Runtime,
    config: LayerConfig,
    plan: LayerPlan,
    memory: ExpertMemory,
    h,
    x,
    routing: Routing,
    elsewhere: jax.Array | None = None,
):
    """Any number of waves, by one program. elsewhere: as of `execute`. -> h, memory."""
    outputs = None
    for wave in plan.waves:
        memory = _fetch(runtime, memory, wave.fetch)
        memory = wait_for_copies(runtime, memory, wave.slots)
        if outputs is None:  # what the host computes is waited for behind the first copies
            outputs = _first_outputs(runtime, h, x, routing, elsewhere)
        outputs = stages.experts_wave(config, outputs, x, routing.ids, memory.pool, wave.slots)
    return stages.combine(h, outputs, routing), memory


def _first_outputs(runtime: Runtime, h: jax.Array, x: jax.Array, routing: Routing, elsewhere: jax.Array | None) -> jax.Array:
    """[n, A, M], to which the waves add theirs; divided as h is."""
    if elsewhere is not None:
        return runtime.context.to_accelerator(elsewhere)
    place, shape = runtime.context.place, (*routing.ids.shape, x.shape[-1])
    return jnp.zeros(shape, jnp.float32, device=place if split_of(h) is None else place_of_rows(place, shape[0]))


def _fetch(runtime: Runtime, memory: ExpertMemory, copies) -> ExpertMemory:
    """Starts the copies (layer, expert, slot)."""
    retained = memory.retained_experts and retained_experts.after_copies(memory.retained_experts, copies)
    pool, arriving = runtime.experts.store.fetch(_pool(memory), copies, memory.arriving)
    return memory._replace(pool=pool, arriving=arriving, retained_experts=retained)


def wait_for_copies(runtime: Runtime, memory: ExpertMemory, slots: np.ndarray | None = None) -> ExpertMemory:
    """With what was sent for in the pool: that of these slots (None: all). Waits for it."""
    pool, arriving = runtime.experts.store.finish_copies(_pool(memory), memory.arriving, slots)
    return memory._replace(pool=pool, arriving=arriving)


def _revive(
    memory: ExpertMemory, retained: RetainedExperts, moe: int, wanted: np.ndarray, counts: np.ndarray, predicted: np.ndarray
) -> tuple[ExpertMemory, np.ndarray]:
    """Takes wanted experts [E] of a layer with experts out of free slots. -> memory, the order in which slots are overwritten."""
    retained = retained_experts.after_pass(retained, moe, counts)
    of_layer = np.zeros(retained.usage.shape, bool)
    of_layer[moe] = wanted
    residency = retained_experts.revive(memory.residency, retained, of_layer, room=len(retained.holds))
    priority = retained_experts.eviction_priority(retained, _ahead(retained, predicted, first_layer=moe + 1))
    return memory._replace(residency=residency, retained_experts=retained), priority


def _ahead(retained: RetainedExperts, predicted: np.ndarray, *, first_layer: int) -> np.ndarray:
    """Of predicted choices those of the layers that a pass has yet to reach; an encoder's are none of them."""
    ahead = np.zeros(retained.usage.shape, predicted.dtype)
    ahead[first_layer : len(predicted)] = predicted[first_layer:]
    return ahead


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
    pool, arriving = runtime.experts.store.finish_arrived(_pool(memory), memory.arriving)
    memory = memory._replace(pool=pool, arriving=arriving)
    limit, residency, retained = (
        runtime.experts.store.copies_within(budget_s, len(arriving)),
        memory.residency,
        memory.retained_experts,
    )
    if retained is not None:
        room = residency.free - memory.slots.dispatch
        residency = retained_experts.revive(residency, retained, ahead > 0, room)
    runtime.experts.store.tier.read_ahead(np.where(residency.slot_of < 0, ahead, 0))
    copies, residency = plan_prefetch(
        residency,
        np.where(runtime.experts.store.tier.ready(), ahead, 0),
        reserve=memory.slots.dispatch,
        limit=limit,
        in_use=in_use,
        eviction_priority=None if retained is None else retained_experts.eviction_priority(retained, ahead),
    )
    prefetched = memory.prefetched.copy()
    for layer, expert, _ in copies:
        prefetched[layer, expert] = True
    return _fetch(runtime, memory._replace(residency=residency, prefetched=prefetched), copies), len(copies)


def _pool(memory: ExpertMemory) -> Pool:
    """Every flow that fetches into slots has one."""
    assert memory.pool is not None
    return memory.pool
