"""How long an iteration takes under a plan whose memory is known; the pass is timed by its flow (flows/). Pure.

An on-demand layer cannot start its copies before its router has run, so copies and computation add up; a prefetch while
drafting subtracts what the link can send in that time, and the oracle of MoE-Overlap hides a layer's copies behind computation.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.offload.stream_schedule import RESOURCES, Task
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import DISK, NETWORK, PEERS, Cost, Load
from specmoe_jax.planner.drafts.protocol import DraftCosts
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.layer_costs import attention_block, layers_alike
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount
from specmoe_jax.planner.simulate import Simulation


class Timing(NamedTuple):
    """One iteration: the drafting, a pass, its head and what the host does. busy_s: by resource. link_bytes: of experts.

    floor_s: of the pass alone. simulation: of a streamed pass, else None.
    """

    iteration_s: float
    draft_s: float
    busy_s: dict[str, float]
    link_bytes: float
    floor_s: float
    simulation: Simulation | None = None


class Setting(NamedTuple):
    """What a pass is timed for. load: of all rows together."""

    config: ModelConfig
    plan: Plan
    hardware: Hardware
    account: MemoryAccount
    load: Load
    skew: float

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.plan.dtype]

    @property
    def dense_itemsize(self) -> float:
        """Bytes of a number of a dense matrix."""
        return dense_itemsize(self.plan.dtype, self.plan.dense_dtype)

    @property
    def probabilities(self) -> tuple[float, ...]:
        return routing.choice_probabilities(self.config.num_experts, self.config.experts_per_token, self.skew)

    @property
    def own_load(self) -> Load:
        """Of one device."""
        return costs.own_load(self.load, self.plan)

    def experts(self, load: Load, *, programs: int = 1) -> list[Cost]:
        """Of a layer's experts for some rows on the busiest device, and of what the devices exchange."""
        config, devices, tokens = self.config, self.plan.devices, load.tokens
        used = routing.busiest(routing.distinct(self.probabilities, tokens), config.num_experts, devices)
        how = {"expert_bytes": self.account.expert_bytes, "programs": programs, "share": 1 / devices}
        return [
            costs.experts(config, tokens, used, self.itemsize, **how),
            *costs.gather(config, load, self.plan, self.hardware.hosts),
        ]

    def attention_block(self, index: int) -> list[Cost]:
        """Of a layer, on one device: see layer_costs."""
        tier, dense = self.plan.cache_tier, self.dense_itemsize
        return attention_block(self.config, index, self.own_load, self.itemsize, dense=dense, tier=tier)

    def task_cost(self, task: Task, load: Load, *, streamed: float) -> Cost:
        """Of a task of a streamed pass: see costs."""
        one, dense = self.account.expert_bytes, self.dense_itemsize
        return costs.task_cost(self.config, task, load, streamed=streamed, itemsize=self.itemsize, dense=dense, expert_bytes=one)

    def seconds(self, cost: Cost) -> float:
        return costs.seconds(cost, self.hardware, self.plan.dtype)


class LayerCosts(NamedTuple):
    """A layer of a pass: its programs, its copies beside each other, and how many experts those bring.

    waits: for the router, before the copies can start.
    """

    computed: list[Cost]
    copies: list[Cost] = []  # noqa: RUF012 (never written)
    fetched: float = 0.0
    waits: bool = False


def time_pass(setting: Setting, draft: DraftCosts) -> Timing:
    """An iteration in the steady state: draft, pass, head, commit."""
    draft_s = sum(map(setting.seconds, draft.costs)) + draft.syncs * setting.hardware.sync_s
    draft_s += sum(_at_once(setting, *pair) for pair in draft.split)
    timing = setting.plan.flow.time_pass(setting, draft_s)
    busy_s = dict(timing.busy_s)
    for cost in (*draft.costs, *itertools.chain.from_iterable((here, *there) for here, there in draft.split)):
        busy_s[cost.resource] += setting.seconds(cost)
    return timing._replace(busy_s=busy_s)


def _at_once(setting: Setting, here: Cost, there: tuple[Cost, ...]) -> float:
    """An attention on the accelerator and a chain beside it, which on shared cores is after it."""
    seconds = setting.seconds(here), sum(map(setting.seconds, there))
    return sum(seconds) if setting.hardware.accelerator_is_cpu else max(seconds)


def layer_by_layer(setting: Setting, draft_s: float, layer_costs: Callable[[Setting, int, int | None], LayerCosts]) -> Timing:
    """Deviation: with less room than a layer's dispatch the engine works in waves; only their programs are counted.

    layer_costs: (setting, layer, its place among those with experts or None) -> what it takes; asked once for layers that are
    alike.
    """
    config, plan, hardware, load, itemsize = setting.config, setting.plan, setting.hardware, setting.own_load, setting.itemsize
    whole, link_s, fetched, spent = 0.0, 0.0, 0.0, [costs.embed(config, load, itemsize)]
    for index, moe, count in layers_alike(config, pinned_experts(config, plan)):
        layer = layer_costs(setting, index, moe)
        compute_s = sum(map(setting.seconds, layer.computed)) + (hardware.sync_s if layer.waits else 0.0)
        layer_link_s = max(map(setting.seconds, layer.copies), default=0.0)
        whole += count * (max(compute_s, layer_link_s) if plan.prefetch == "oracle" else compute_s + layer_link_s)
        link_s += count * layer_link_s
        fetched += count * layer.fetched
        spent += costs.times(count, [*layer.computed, *layer.copies])
    head = [
        costs.head(config, load.tokens, setting.dense_itemsize),
        *costs.gather_logits(config, setting.load, plan, hardware.hosts),
    ]
    spent += head
    hidden_s = min(draft_s, link_s, _spare_s(setting)) if plan.prefetch == "draft" else 0.0
    return Timing(
        iteration_s=draft_s + whole - hidden_s + sum(map(setting.seconds, head)) + hardware.sync_s + hardware.step_s,
        draft_s=draft_s,
        busy_s=add_busy(dict.fromkeys((*RESOURCES, DISK, PEERS, NETWORK), 0.0), setting, spent),
        link_bytes=fetched * setting.account.expert_bytes,
        floor_s=costs.bound_seconds(spent, hardware, plan.dtype),
    )


def add_busy(busy_s: dict[str, float], setting: Setting, spent: list[Cost]) -> dict[str, float]:
    """busy_s with the seconds of further costs, by resource."""
    for cost in spent:
        busy_s[cost.resource] += setting.seconds(cost)
    return busy_s


def _spare_s(setting: Setting) -> float:
    """What prefetches can fill, in seconds of the link."""
    spare = max(setting.account.num_slots - setting.account.wanted_slots, 0)
    return setting.seconds(costs.fetch(setting.account.expert_bytes, spare))
