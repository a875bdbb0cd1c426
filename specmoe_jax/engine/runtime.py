"""What stays the same over all steps of an engine: weights on the accelerator, the store, the draft, the policies."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from specmoe_jax.config import ModelConfig, Plan
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import Weights
from specmoe_jax.offload.residency import empty, plan_layer
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.planner.memory import MemoryAccount, pinned_experts
from specmoe_jax.speculate.affinity import expert_distances, neighbours
from specmoe_jax.speculate.draft import Draft
from specmoe_jax.speculate.hotness import hot_set
from specmoe_jax.speculate.self_draft import SelfDraft


@dataclasses.dataclass(frozen=True)
class Runtime:
    """keep: (layer, counts [E], resident [E]) -> [E] bool, experts that stay after the layer's pass.

    neighbours: [L, E, E] int32 for the self-draft, else None. resident_slots: [L, E] int32 under the resident
    flow, else None. num_slots: R. single_wave: whether every dispatch fits into the pool at once. host: the CPU.
    """

    config: ModelConfig
    plan: Plan
    weights: Weights
    store: ExpertStore
    draft: Draft | None
    keep: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
    neighbours: np.ndarray | None
    resident_slots: np.ndarray | None
    num_slots: int
    single_wave: bool
    device: jax.Device
    host: jax.Device
    activations: Link  # counts what crosses between accelerator and host beside experts

    def to_host(self, arrays):
        """Copies activations to the CPU that holds the KV cache."""
        self.activations.send(sum(array.nbytes for array in arrays))
        return jax.device_put(arrays, self.host)

    def to_accelerator(self, array: jax.Array) -> jax.Array:
        """Copies attention outputs back."""
        self.activations.send(array.nbytes)
        return jax.device_put(array, self.device)


def build(model: Model, plan: Plan, account: MemoryAccount, draft: Draft | None) -> Runtime:
    """The runtime of a plan whose account fits. Copies the weights (not the experts) to the accelerator."""
    config, device = model.config, jax.devices()[0]
    resident = plan.expert_flow == "resident"
    order = np.arange(config.num_layers * config.num_experts, dtype=np.int32)
    return Runtime(
        config=config,
        plan=plan,
        weights=jax.device_put(model.weights, device),
        store=ExpertStore(model.experts, Link(plan.link_bytes_per_s)),
        draft=draft or (SelfDraft(length=plan.draft_length) if plan.draft == "self" else None),
        keep=_keep(config, plan),
        neighbours=_neighbours(model) if plan.draft == "self" else None,
        resident_slots=order.reshape(config.num_layers, config.num_experts) if resident else None,
        num_slots=account.num_slots,
        single_wave=account.num_slots >= account.wanted_slots,
        device=device,
        host=jax.local_devices(backend="cpu")[0],
        activations=Link(),
    )


def first_memory(rt: Runtime) -> ExpertMemory:
    """A new pool with what must always be there: all experts (resident flow) or a first draft set per layer."""
    config = rt.config
    pool = jax.device_put(rt.store.new_pool(rt.num_slots), rt.device)
    residency = empty(config.num_layers, config.num_experts, rt.num_slots)
    none, no_votes = np.zeros(config.num_experts, bool), np.zeros(config.num_experts, np.int64)
    for layer in range(config.num_layers):
        plan, residency = plan_layer(residency, layer, none, rt.keep(layer, no_votes, none))
        for wave in plan.waves:
            pool = rt.store.fetch(pool, layer, wave)
    return ExpertMemory(pool=pool, residency=residency)


def _keep(config: ModelConfig, plan: Plan):
    """HotTemporal (SpecMoE): the N experts that the latest pass chose most. N = 0 keeps nothing (OnDemand)."""
    size = pinned_experts(config, plan)
    return lambda layer, counts, resident: hot_set(counts, resident, size)


def _neighbours(model: Model) -> np.ndarray:
    """[L, E, E]: for each expert the others by L2 distance, nearest first (SpecMoE, affinity)."""
    return np.stack(
        [
            neighbours(expert_distances(lambda expert, blocks=blocks: np.asarray(blocks[expert]), len(blocks)))
            for blocks in model.experts
        ]
    )
