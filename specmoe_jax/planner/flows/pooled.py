"""What flows over a pool of expert slots share: whole rows of KV cache, and batches of requests one after the other."""

import dataclasses
from collections.abc import Sequence

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.experts import is_computed_in_place
from specmoe_jax.models.packing import planned
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import DISK, Cost, Load
from specmoe_jax.planner.flows.protocol import FlowMemory
from specmoe_jax.planner.memory.account import pinned_experts
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.planner.passes import LayerCosts, Setting, Timing, layer_by_layer


@dataclasses.dataclass(frozen=True)
class PooledFlowDescription:
    """The answers that the resident and the on_demand flow have in common; see protocol.ExpertFlowDescription."""

    name: str
    all_resident: bool
    keeps_experts: bool
    tells_routing: bool
    streams_layers: bool = False
    workers: bool = False
    several_devices: bool = True
    host_cache_policy: str = "expected"

    def check(self, plan: Plan, config: ModelConfig) -> None:
        """No checks beyond the table of a plan's fields."""

    def resolved(self, plan: Plan, *, accelerator_is_cpu: bool) -> Plan:
        return plan

    def reads_pages(self, plan: Plan) -> bool:
        return False

    def is_measured(self, plan: Plan) -> bool:
        return not plan.cache_tier.on_host and plan.devices == 1

    def batch_rows(self, plan: Plan, rows: int) -> int:
        return rows

    def paged_load(self, plan: Plan, sizes: Sequence[tuple[int, int]], rows: int) -> PagedLoad | None:
        return None

    def running_rows(self, plan: Plan, account: MemoryAccount, tokens: int) -> int:
        return plan.batch_size

    def memory(self, config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None) -> FlowMemory:
        """Of a device: its share of the experts that stay, and as many of its own as a batch may ask for in all."""
        own = most_experts(plan.devices, config.num_experts)
        tokens = max(plan.tokens_per_pass, plan.prefill_chunk) * batch_rows
        dispatch = min(own, tokens * config.experts_per_token)
        everything = config.num_expert_layers * own  # an encoder's as well
        kept = sum(most_experts(plan.devices, count) for count in pinned_experts(config, plan))
        pinned = everything if self.all_resident else kept
        return FlowMemory(
            pass_tokens=tokens,
            dispatch=dispatch,
            pinned_slots=pinned,
            wanted_slots=pinned + (0 if pinned == everything else dispatch),
            cached_positions=batch_rows * positions,
        )

    def smallest_slots(self, account: MemoryAccount) -> int:
        """One free slot carries a dispatch, wave by wave."""
        return min(account.pinned_slots + 1, account.num_slots)

    def what_needs_slots(self, plan: Plan) -> str:
        return "one layer's dispatch"

    def fill_budget(self, account: MemoryAccount, config: ModelConfig, plan: Plan) -> MemoryAccount:
        return account

    def without_budget(self, plan: Plan) -> Plan:
        return plan

    def prefill_seconds(self, setting: Setting, prompt_tokens: int) -> float:
        """One chunk after the other."""
        chunk = min(setting.plan.prefill_chunk, prompt_tokens)
        load = Load(setting.load.rows, chunk, prompt_tokens / 2)
        each = setting._replace(load=load, plan=setting.plan.replace(prefetch="none"))
        return self.time_pass(each, 0.0).iteration_s * prompt_tokens / chunk

    def time_pass(self, setting: Setting, draft_s: float) -> Timing:
        return layer_by_layer(setting, draft_s, self.layer_costs)

    def layer_costs(self, setting: Setting, index: int, moe: int | None) -> LayerCosts:
        """Of a layer in a pass; moe: its place among those with experts."""
        raise NotImplementedError

    def busy_share(self, requests: int, rows: int, slowest_row_factor: float) -> float:
        """Each batch runs until the last of its rows has ended."""
        batches = -(-requests // rows)
        return requests / (batches * rows) / slowest_row_factor


def without_kernel(config: ModelConfig, plan: Plan) -> str | None:
    """Experts that no compiled kernel computes where they lie in host memory, for messages; None where there are none."""
    experts = [planned(one, plan.expert_dtype) for one in config.layer_experts]
    other = next((one for one in experts if not is_computed_in_place(one)), None)
    if other is None:
        return None
    return f"the experts of {config.family}" + ("" if other.packing is None else f" packed as {other.packing}")


def disk_reads(setting: Setting, used: float) -> list[Cost]:
    """Of a layer's used experts those that are not in host memory, which keeps the most popular of each layer."""
    if setting.plan.expert_tier != "disk":
        return []
    held = setting.account.host_experts / setting.config.num_expert_layers
    absent = min(routing.missed(setting.probabilities, setting.load.tokens, min(held, setting.config.num_experts)), used)
    return [costs.fetch(setting.account.expert_bytes, absent, operator="read", resource=DISK)]
