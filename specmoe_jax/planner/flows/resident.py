"""Every expert stays on the accelerator: nothing crosses the link after the start."""

import dataclasses
from collections.abc import Iterable

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.planner import routing
from specmoe_jax.planner.drafts.search_starts import SearchStart
from specmoe_jax.planner.flows.pooled import PooledFlowDescription
from specmoe_jax.planner.measured.case import Case, MeasuredPass, layer_work
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.passes import LayerCosts, Setting


@dataclasses.dataclass(frozen=True)
class ResidentFlowDescription(PooledFlowDescription):
    def moving_experts(self, config: ModelConfig, expert_bytes: int) -> int:
        return 0

    def crossing_experts(self, config: ModelConfig, plan: Plan, probabilities: tuple[float, ...], tokens: float) -> float:
        return 0.0

    def layer_costs(self, setting: Setting, index: int, moe: int | None) -> LayerCosts:
        """One program with a KV cache on the accelerator, else the experts are one of their own."""
        block = setting.attention_block(index)
        if moe is not None:
            block += setting.experts(setting.load, programs=int(setting.plan.cache_tier.on_host))
        return LayerCosts(block)

    def measured_pass(
        self, config: ModelConfig, plan: Plan, operators: Operators, case: Case, drafted_s: float, *, accelerator_is_cpu: bool
    ) -> MeasuredPass:
        new = plan.tokens_per_pass
        blocks = routing.distinct(case.probabilities, case.choosing(new))
        work = layer_work(case.rows, new, case.context)
        seconds = config.num_moe_layers * operators.seconds("resident_layer", blocks=blocks, **work)
        seconds += (config.num_layers - config.num_moe_layers) * operators.seconds("attention", **work)
        return MeasuredPass(verify_s=seconds, naive_s=drafted_s + seconds, link_s=0.0, misses=0.0)

    def search_starts(self, config: ModelConfig) -> Iterable[SearchStart]:
        return (SearchStart(preset("resident", config), ()),)


FLOW = ResidentFlowDescription("resident", all_resident=True, keeps_experts=False, tells_routing=False)
