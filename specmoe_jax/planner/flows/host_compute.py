"""Experts are computed where they lie in host memory, where the accelerator is the CPU: the resident flow without its pool."""

import dataclasses
from collections.abc import Iterable

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.ops import isas
from specmoe_jax.planner.drafts.search_starts import SearchStart
from specmoe_jax.planner.flows.pooled import disk_reads, without_kernel
from specmoe_jax.planner.flows.protocol import FlowMemory
from specmoe_jax.planner.flows.resident import ResidentFlowDescription
from specmoe_jax.planner.memory.memory_account import PagedLoad
from specmoe_jax.planner.passes import LayerCosts, Setting
from specmoe_jax.support.errors import MachineError, PlanError


@dataclasses.dataclass(frozen=True)
class HostComputeFlowDescription(ResidentFlowDescription):
    def check(self, plan: Plan, config: ModelConfig) -> None:
        """Raises PlanError for experts that no compiled kernel computes, and for ways to read a disk."""
        super().check(plan, config)
        if what := without_kernel(config, plan):
            raise PlanError(f"expert_flow={self.name} has no compiled kernel for {what}; use expert_flow=resident")
        for field in ("dram_policy", "bypass_page_cache"):
            if getattr(plan, field):
                raise PlanError(
                    f"{field} has no effect with expert_flow={self.name}, which leaves it to the system what of a file stays in "
                    "memory; leave it out, or use expert_flow=on_demand"
                )

    def resolved(self, plan: Plan, *, accelerator_is_cpu: bool) -> Plan:
        if not accelerator_is_cpu:
            raise MachineError(f"expert_flow={self.name} is for machines whose accelerator is the CPU; use expert_flow=on_demand")
        if not isas():
            raise MachineError(
                f"expert_flow={self.name} needs the compiled kernels, which cannot run here; use expert_flow=resident"
            )
        return plan

    def reads_pages(self, plan: Plan) -> bool:
        return plan.expert_tier == "disk"

    def layer_costs(self, setting: Setting, index: int, moe: int | None) -> LayerCosts:
        """All of a layer's experts are asked for before the first is computed."""
        found = super().layer_costs(setting, index, moe)
        if moe is None:
            return found
        return found._replace(copies=disk_reads(setting, setting.config.num_experts))

    def memory(self, config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None) -> FlowMemory:
        """No slots."""
        needs = super().memory(config, plan, batch_rows=batch_rows, positions=positions, paged=paged)
        return needs._replace(dispatch=0, pinned_slots=0, wanted_slots=0)

    def search_starts(self, config: ModelConfig) -> Iterable[SearchStart]:
        return (SearchStart(preset("resident", config).replace(expert_flow=self.name), ()),)


FLOW = HostComputeFlowDescription(
    "host_compute", all_resident=True, keeps_experts=False, tells_routing=False, several_devices=False
)
