"""How long a pass takes under a plan whose memory is known: streamed ones by simulation, the others layer by layer. Pure.

An on-demand layer cannot start its copies before its router has spoken, so its link and its computation add up; a prefetch while
drafting takes off what the link can send in that time, the oracle of MoE-Overlap hides a layer's copies behind computation.
"""

import functools
import itertools
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.positions import PREFILL_TOKENS
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.offload.stream_schedule import RESOURCES, UP, Task, pass_tasks, spread
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import DISK, Cost, Load
from specmoe_jax.planner.drafts.protocol import DraftCosts
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.layer_costs import attention_block
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount
from specmoe_jax.planner.simulate import Simulation, simulate

STREAM_PIECES = 16  # at most, in which the simulator cuts a layer's experts: what waits on the link waits for one of them


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
    def item(self) -> int:
        return DTYPE_BYTES[self.plan.dtype]

    @property
    def probabilities(self) -> tuple[float, ...]:
        return routing.choice_probabilities(self.config.num_experts, self.config.experts_per_token, self.skew)

    def seconds(self, cost: Cost) -> float:
        return costs.seconds(cost, self.hardware, self.plan.dtype)


def time_pass(setting: Setting, draft: DraftCosts) -> Timing:
    """An iteration in the steady state: draft, pass, head, commit."""
    draft_s = sum(map(setting.seconds, draft.costs)) + draft.syncs * setting.hardware.sync_s
    draft_s += sum(_at_once(setting, *pair) for pair in draft.split)
    time = _streamed if setting.plan.expert_flow == "stream" else _layer_by_layer
    timing = time(setting, draft_s)
    busy_s = dict(timing.busy_s)
    for cost in (*draft.costs, *itertools.chain.from_iterable((here, *there) for here, there in draft.split)):
        busy_s[cost.resource] += setting.seconds(cost)
    return timing._replace(busy_s=busy_s)


def _at_once(setting: Setting, here: Cost, there: tuple[Cost, ...]) -> float:
    """An attention on the accelerator and a chain beside it, which on shared cores is after it."""
    seconds = setting.seconds(here), sum(map(setting.seconds, there))
    return sum(seconds) if setting.hardware.accelerator_is_cpu else max(seconds)


def _streamed(setting: Setting, draft_s: float) -> Timing:
    config, plan, hardware = setting.config, setting.plan, setting.hardware
    item = setting.load._replace(rows=setting.load.rows / plan.micro_batches)
    chunks = min(config.num_experts, STREAM_PIECES)
    used = routing.distinct(setting.probabilities, item.tokens)

    one = setting.account.expert_bytes

    @functools.cache
    def cost(kind: str, layer: int) -> Cost:
        task = Task(kind, layer, 0, ())
        return costs.task_cost(config, task, item, distinct=used, chunks=chunks, item=setting.item, expert_bytes=one)

    @functools.cache
    def seconds(kind: str, layer: int) -> float:
        return setting.seconds(cost(kind, layer))

    alike = _alike(config)

    pinned = spread(config.moe_layers, setting.account.pinned_layers)
    has_experts = tuple(index is not None for index in config.moe_index)
    tasks = pass_tasks(has_experts, plan.micro_batches, chunks, plan.layer_buffers, pinned)
    head = costs.head(config, setting.load.tokens, setting.item)
    between_s = draft_s + setting.seconds(head) + hardware.sync_s + hardware.step_s
    simulation = simulate(
        tasks,
        lambda task: seconds(task.kind, alike[task.layer]),
        draft_s=between_s,
        accelerator_is_cpu=hardware.accelerator_is_cpu,
        overlap=hardware.overlap,
    )
    own = dict.fromkeys((*RESOURCES, DISK), 0.0)
    for task in tasks:
        own[task.resource] += seconds(task.kind, alike[task.layer])
    everything = [cost(task.kind, alike[task.layer]) for task in tasks]
    return Timing(
        iteration_s=simulation.iteration_s,
        draft_s=draft_s,
        busy_s=_with(own, setting, [head]),
        link_bytes=float((config.num_moe_layers - len(pinned)) * config.num_experts * setting.account.expert_bytes),
        floor_s=costs.bound_seconds([*everything, head], hardware, plan.dtype),
        simulation=simulation,
    )


def _alike(config: ModelConfig) -> list[int]:
    """Of each layer the first that is like it: their tasks cost the same."""
    return [config.layers.index(layer) for layer in config.layers]


def _layer_by_layer(setting: Setting, draft_s: float) -> Timing:
    """Deviation: with less room than a layer's dispatch the engine works in waves; only their programs are counted."""
    config, plan, hardware, load, item = setting.config, setting.plan, setting.hardware, setting.load, setting.item
    used = routing.distinct(setting.probabilities, load.tokens)
    whole, link_s, fetched, spent = 0.0, 0.0, 0.0, [costs.embed(config, load, item)]
    for index, moe in enumerate(config.moe_index):
        block, copies = attention_block(config, index, load, item, kv_tier=plan.kv_tier), []
        if moe is not None:
            missed = _missed(setting, moe)
            copies = [costs.fetch(setting.account.expert_bytes, missed), *_disk_reads(setting, missed)]
            fused = plan.expert_flow == "resident" and plan.kv_tier == "accelerator"
            programs, one = 0 if fused else _waves(setting, missed), setting.account.expert_bytes
            block.append(costs.experts(config, load.tokens, used, item, expert_bytes=one, programs=programs))
            fetched += missed
        compute_s = sum(map(setting.seconds, block)) + (hardware.sync_s if copies and plan.expert_flow != "resident" else 0.0)
        layer_link_s = max(map(setting.seconds, copies), default=0.0)
        whole += max(compute_s, layer_link_s) if plan.prefetch == "oracle" else compute_s + layer_link_s
        link_s += layer_link_s
        spent += [*block, *copies]
    head = costs.head(config, load.tokens, item)
    spent.append(head)
    hidden_s = min(draft_s, link_s, _spare_s(setting)) if plan.prefetch == "draft" else 0.0
    return Timing(
        iteration_s=draft_s + whole - hidden_s + setting.seconds(head) + hardware.sync_s + hardware.step_s,
        draft_s=draft_s,
        busy_s=_with(dict.fromkeys((*RESOURCES, DISK), 0.0), setting, spent),
        link_bytes=fetched * setting.account.expert_bytes,
        floor_s=costs.bound_seconds(spent, hardware, plan.dtype),
    )


def _with(busy_s: dict[str, float], setting: Setting, spent: list[Cost]) -> dict[str, float]:
    for cost in spent:
        busy_s[cost.resource] += setting.seconds(cost)
    return busy_s


def _missed(setting: Setting, moe: int) -> float:
    """Experts of a layer that cross the link in one pass. retain: the free slots hold leftovers of all layers in equal shares."""
    if setting.plan.expert_flow == "resident":
        return 0.0
    resident = float(pinned_experts(setting.config, setting.plan)[moe])
    if setting.plan.retain:
        resident += max(setting.account.num_slots - setting.account.pinned_slots, 0) / setting.config.num_moe_layers
    return routing.missed(setting.probabilities, setting.load.tokens, min(resident, setting.config.num_experts))


def _waves(setting: Setting, missed: float) -> int:
    free = max(setting.account.num_slots - setting.account.pinned_slots, 1)
    return max(1, -(-round(missed) // free))


def _disk_reads(setting: Setting, missed: float) -> list[Cost]:
    """Of the missed experts those that are not in host memory, which keeps the most popular ones in equal shares of the layers."""
    if setting.plan.expert_tier != "disk":
        return []
    held = setting.account.host_experts / setting.config.num_expert_layers
    absent = min(routing.missed(setting.probabilities, setting.load.tokens, min(held, setting.config.num_experts)), missed)
    return [costs.fetch(setting.account.expert_bytes, absent, operator="read", resource=DISK)]


def _spare_s(setting: Setting) -> float:
    """What prefetches can fill, in seconds of the link."""
    spare = max(setting.account.num_slots - setting.account.wanted_slots, 0)
    return setting.seconds(costs.fetch(setting.account.expert_bytes, spare))


def prefill_seconds(setting: Setting, prompt_tokens: int) -> float:
    """The prompts of all rows, one after the other by chunks; streamed ones go through each layer together.

    Deviation: a lower estimate for streamed ones, the busiest resource alone.
    """
    rows, plan = setting.load.rows, setting.plan
    if plan.expert_flow != "stream":
        chunk = min(plan.prefill_chunk, prompt_tokens)
        each = setting._replace(load=Load(rows, chunk, prompt_tokens / 2), plan=plan.replace(prefetch="none"))
        return _layer_by_layer(each, 0.0).iteration_s * prompt_tokens / chunk
    items = max(rows * prompt_tokens / PREFILL_TOKENS, 1.0)
    load = Load(min(PREFILL_TOKENS / prompt_tokens, rows), prompt_tokens, prompt_tokens / 2)
    used = routing.distinct(setting.probabilities, load.tokens)
    busy = dict.fromkeys(RESOURCES, 0.0)
    pinned = spread(setting.config.moe_layers, setting.account.pinned_layers)
    has_experts = tuple(index is not None for index in setting.config.moe_index)
    prompts = 1 if plan.prefill_attention == "accelerator" else 0
    for task in pass_tasks(has_experts, 1, 1, plan.layer_buffers, pinned, prompts):
        cost = costs.task_cost(
            setting.config, task, load, distinct=used, chunks=1, item=setting.item, expert_bytes=setting.account.expert_bytes
        )
        busy[task.resource] += setting.seconds(cost) * (1 if task.resource == UP and task.kind == "stream" else items)
    return max(busy.values())
