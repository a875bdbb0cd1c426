"""Experts are fetched when a router chooses them; experts that the plan keeps are hits."""

import dataclasses
import math
from collections.abc import Iterable

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.ops import isas
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.drafts.search_starts import WORTH, Axis, SearchStart, expert_counts
from specmoe_jax.planner.flows.pooled import PooledFlowDescription, disk_reads, without_kernel
from specmoe_jax.planner.flows.protocol import FlowMemory
from specmoe_jax.planner.layer_costs import layers_alike
from specmoe_jax.planner.measured.case import Case, MeasuredPass, kept_experts, layer_work, pinned_slots
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import PagedLoad, arriving_experts
from specmoe_jax.planner.passes import LayerCosts, Setting, layer_by_layer
from specmoe_jax.support.errors import MachineError, PlanError

# Whole: a small share costs as much as it saves.
HOST_SHARES = Axis("host_share", (None, 0.25, 0.5, 0.75, 1.0), least_gain=WORTH, whole=True)
RETAIN = Axis("retain", (False, True), least_gain=1.0)  # gains more than is predicted (search.EQUAL)
GATES_RIGHT = 0.8  # of a pass's misses, the share that the draft's gates foresee (prefetch=draft)


@dataclasses.dataclass(frozen=True)
class OnDemandFlowDescription(PooledFlowDescription):
    def check(self, plan: Plan, config: ModelConfig) -> None:
        """Raises PlanError for a host share of experts that no compiled kernel computes."""
        super().check(plan, config)
        if plan.host_share is None:
            return
        if what := without_kernel(config, plan):
            raise PlanError(f"host_share is {plan.host_share}, but the host has no compiled kernel for {what}; leave it out")

    def resolved(self, plan: Plan, *, accelerator_is_cpu: bool) -> Plan:
        if plan.host_share is not None and not isas():
            raise MachineError(
                f"host_share is {plan.host_share}, but the host's compiled kernels cannot run here (specmoe doctor says why); "
                "leave it out"
            )
        return plan

    def moving_experts(self, config: ModelConfig, expert_bytes: int) -> int:
        return arriving_experts(expert_bytes, config.num_experts)

    def memory(self, config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None) -> FlowMemory:
        """Of more than a chunk of prompts the hidden states wait between two layers. A decoder beside an encoder has none."""
        needs = super().memory(config, plan, batch_rows=batch_rows, positions=positions, paged=paged)
        waits = (
            positions > plan.prefill_chunk
            and config.encoder is None
            and needs.dispatch == most_experts(plan.devices, config.num_experts)
        )
        return needs._replace(waiting_tokens=batch_rows * positions if waits else 0)

    def prefill_seconds(self, setting: Setting, prompt_tokens: int) -> float:
        """Chunk by chunk but for the link, which brings a layer once; chunk after chunk where the slots do not hold a layer."""
        if setting.account.dispatch_slots < most_experts(setting.plan.devices, setting.config.num_experts):
            return super().prefill_seconds(setting, prompt_tokens)
        chunk, plan = min(setting.plan.prefill_chunk, prompt_tokens), setting.plan.replace(prefetch="none")
        each = setting._replace(load=Load(setting.load.rows, chunk, prompt_tokens / 2), plan=plan)
        whole = each._replace(load=Load(setting.load.rows, prompt_tokens, prompt_tokens / 2))
        computed = layer_by_layer(each, 0.0, lambda *layer: self.layer_costs(*layer)._replace(copies=[]))
        link_s = 0.0
        for index, moe, count in layers_alike(setting.config, pinned_experts(setting.config, setting.plan)):
            copies = self.layer_costs(whole, index, moe).copies
            link_s += count * max(map(setting.seconds, copies), default=0.0)
        return computed.iteration_s * prompt_tokens / chunk + link_s

    def crossing_experts(self, config: ModelConfig, plan: Plan, probabilities: tuple[float, ...], tokens: float) -> float:
        return _crossing(plan, routing.missed(probabilities, tokens, pinned_experts(config, plan)[0]))

    def layer_costs(self, setting: Setting, index: int, moe: int | None) -> LayerCosts:
        config, load = setting.config, setting.load
        block = setting.attention_block(index)
        if moe is None:
            return LayerCosts(block)
        missed, one = _missed(setting, moe), setting.account.expert_bytes
        fetched = _crossing(setting.plan, missed)
        kept = pinned_experts(config, setting.plan)[moe]
        crossing = routing.busiest(fetched, config.num_experts, setting.plan.devices, kept)  # over one link
        block += setting.experts(load, programs=_waves(setting, crossing))
        beside = [costs.fetch(one, crossing), *disk_reads(setting, missed), *_on_host(setting, missed - fetched)]
        return LayerCosts(block, beside, fetched, waits=True)

    def measured_pass(
        self, config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, accelerator_is_cpu: bool
    ) -> MeasuredPass:
        """Layer by layer: attention, then the misses over the link, then the experts."""
        new, layers = plan.tokens_per_pass, config.num_moe_layers
        work = layer_work(case.rows, new, case.context)
        tokens = case.choosing(new)
        used = routing.distinct(case.probabilities, tokens)
        absent = routing.missed(case.probabilities, tokens, kept_experts(config, plan, case))
        misses = _crossing(plan, absent)
        expert_s = operators.expert_bytes / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
        ahead = 0.0  # of a layer's misses, those that arrive while drafting, in slots that no dispatch needs
        if plan.prefetch == "draft" and expert_s:
            spare = max(case.slots - case.wanted_slots, 0)
            ahead = min(GATES_RIGHT * misses, drafted_s / expert_s / layers, spare / layers)
        copied = misses - ahead
        waves = max(1, math.ceil(used / max(case.slots - pinned_slots(config, plan), 1))) if case.slots < case.wanted_slots else 0
        if plan.host_share is None:
            without_s = operators.seconds("on_demand_layer", blocks=used, misses=0, waves=waves, **work)
            with_s = operators.seconds("on_demand_layer", blocks=used, misses=copied, waves=waves, **work)
        else:  # what is resident and the waves cost what they cost without
            hits, none = max(used - absent, 0), {"misses": 0, **work}
            beside_s = operators.seconds("on_demand_layer", blocks=hits, waves=waves, **none)
            beside_s -= operators.seconds("on_demand_layer", blocks=0, waves=0, **none)
            without_s = beside_s + operators.seconds("hosted_layer", hosted=absent - misses, **none)
            with_s = beside_s + operators.seconds("hosted_layer", hosted=absent - misses, misses=copied, **work)
        link_s = misses * expert_s if expert_s else with_s - without_s
        layer_s = max(with_s, without_s + copied * expert_s)
        naive_s = max(without_s, link_s)
        dense_s = (config.num_layers - layers) * operators.seconds("attention", **work)
        return MeasuredPass(layers * layer_s + dense_s, drafted_s + layers * naive_s + dense_s, layers * link_s, layers * misses)

    def search_starts(self, config: ModelConfig) -> Iterable[SearchStart]:
        cached = Axis("cached_experts", expert_counts(config.num_experts))
        return (
            SearchStart(preset("on_demand", config), (RETAIN, HOST_SHARES)),
            SearchStart(preset("caching", config), (cached, RETAIN, HOST_SHARES)),
        )


def _missed(setting: Setting, moe: int) -> float:
    """Experts of a layer that cross the link in one pass. retain: the free slots hold experts of all layers in equal shares."""
    resident = float(pinned_experts(setting.config, setting.plan)[moe])
    if setting.plan.retain:
        resident += max(setting.account.num_slots - setting.account.pinned_slots, 0) / setting.config.num_moe_layers
    return routing.missed(setting.probabilities, setting.load.tokens, min(resident, setting.config.num_experts))


def _crossing(plan: Plan, missed: float) -> float:
    """Of a layer's missed experts those that the link brings."""
    return missed * (1 - (plan.host_share or 0.0))


def _on_host(setting: Setting, computed: float) -> list[Cost]:
    """Experts that the host's cores compute where they lie, while others cross the link.

    Deviation: `offload.host_share.MOST_CHOICES` is not looked at, each expert is taken to have the same tokens, and the
    activations, which cross the link both ways, are left out.
    """
    if not computed:
        return []
    config, tokens = setting.config, setting.load.tokens
    used = max(routing.distinct(setting.probabilities, tokens), computed)
    return [costs.host_experts(config, tokens, computed, setting.account.expert_bytes, computed / used, setting.hardware)]


def _waves(setting: Setting, missed: float) -> int:
    free = max(setting.account.num_slots - setting.account.pinned_slots, 1)
    return max(1, -(-round(missed) // free))


FLOW = OnDemandFlowDescription("on_demand", all_resident=False, keeps_experts=True, tells_routing=True)
