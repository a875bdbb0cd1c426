"""The hierarchical roofline (SpecMoEOff, Figure 3): each operator at each memory that feeds it. Pure."""

from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU, UP
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import DISK, Cost, Load
from specmoe_jax.planner.hardware import Hardware


class Roof(NamedTuple):
    """A memory and the unit that it feeds: at most min(flops, intensity * bytes_per_s)."""

    level: str
    unit: str
    flops: float
    bytes_per_s: float


class Point(NamedTuple):
    """An operator at one level. intensity: flop per byte of that level. attainable: flop/s there, efficiencies left out."""

    operator: str
    roof: Roof
    intensity: float

    @property
    def attainable(self) -> float:
        return min(self.roof.flops, self.intensity * self.roof.bytes_per_s)


def roofs(hardware: Hardware, dtype: str) -> dict[str, Roof]:
    """By level. What crosses the link or comes from disk is computed on the accelerator."""
    limits = costs.limits(hardware, dtype)
    peak = limits[ACCELERATOR][0]
    return {
        ACCELERATOR: Roof("accelerator memory", "accelerator", peak, limits[ACCELERATOR][1]),
        CPU: Roof("host memory", "CPU", limits[CPU][0], limits[CPU][1]),
        UP: Roof("link", "accelerator", peak, limits[UP][1]),
        DISK: Roof("disk", "accelerator", peak, limits[DISK][1]),
    }


def points(config: ModelConfig, plan: Plan, hardware: Hardware, load: Load, *, skew: float) -> tuple[Point, ...]:
    """The operators of a layer with experts under a plan, and the attention as it would be with the cache moved over the link."""
    itemsize, index = DTYPE_BYTES[plan.dtype], next(i for i in config.moe_layers if i not in config.recurrent_layers)
    layer, sizes = config.layers[index], costs.layer_sizes(config)[index]
    p = routing.choice_probabilities(config.num_experts, config.experts_per_token, skew)
    one = costs.expert_bytes(config, plan)
    ffn = costs.experts(config, load.tokens, routing.distinct(p, load.tokens), itemsize, expert_bytes=one)
    crossing = plan.flow.crossing_experts(config, plan, p, load.tokens)
    on_cpu = costs.attention(layer.attention, load, itemsize, resource=CPU)
    dense = costs.projections(sizes.before + sizes.after, load, dense_itemsize(plan.dtype, plan.dense_dtype))
    levels = roofs(hardware, plan.dtype)

    def at(operator: str, level: str, cost: Cost, num_bytes: float) -> list[Point]:
        return [Point(operator, levels[level], cost.flops / num_bytes)] if num_bytes else []

    found = [
        *at("experts", ACCELERATOR, ffn, ffn.bytes),
        *at("experts, brought", UP, ffn, costs.fetch(one, crossing).bytes),
        *at("projections", ACCELERATOR, dense, dense.bytes),
        *at("attention", CPU if plan.cache_tier.on_host else ACCELERATOR, on_cpu, on_cpu.bytes),
    ]
    if plan.cache_tier.on_host:
        found += at("attention, cache moved", UP, on_cpu, on_cpu.bytes)
    if plan.expert_tier == "disk":
        found += at("experts, read", DISK, ffn, costs.fetch(one, crossing).bytes)
    return tuple(found)
