"""How far a run was from the machine's limit: the roofline bound of its passes, and the share of it that was reached. Pure.

Floor of a pass = max(expert bytes / link rate, weight and KV bytes / memory rate, FFN flops / accelerator peak, attention flops /
CPU peak). It counts what the run really verified, fetched and read; not what was drafted, as a perfect draft would be free.
Weights are read once a pass: all dense ones, and of the experts those that the run counted, at least what one token chooses.
"""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.figures import Totals
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner import costs
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.hardware import Hardware

LINK, CACHE, WEIGHTS, READS = "link", "cache reads", "weight reads", "weight and cache reads"


def roofline_figures(config: ModelConfig, plan: Plan, totals: Totals, hardware: Hardware) -> dict:
    """floor_s, fraction_of_floor, binding_resource and their parts; None where nothing was generated.

    rates: what the run reached of each resource over the whole decoding, per second. On shared cores the flops add up.
    """
    if not totals.row_steps or not totals.decode_s:
        return {"floor_s": None, "fraction_of_floor": None, "binding_resource": None, "floor_parts_s": {}, "rates": {}}
    itemsize, dtype = DTYPE_BYTES[plan.dtype], plan.dtype
    new, context = totals.verified_tokens / totals.row_steps, totals.context / totals.row_steps
    load = Load(totals.row_steps / totals.steps, new, context)
    flops, kv_bytes = {ACCELERATOR: costs.head(config, load.tokens, itemsize).flops, CPU: 0.0}, 0.0
    dense_size = dense_itemsize(dtype, plan.dense_dtype)
    weight_bytes = config.vocab_size * config.hidden_size * dense_size  # of the head
    attends = CPU if plan.cache_tier.on_host else ACCELERATOR
    for layer, sizes, moe in zip(config.layers, costs.layer_sizes(config), config.moe_index, strict=True):
        attention = costs.attention(layer.attention, load, itemsize, resource=attends)
        flops[attends] += attention.flops
        kv_bytes += attention.bytes
        dense = costs.projections(sizes.before + sizes.after, load, dense_size)
        flops[ACCELERATOR] += dense.flops
        weight_bytes += dense.bytes
        flops[ACCELERATOR] += 0.0 if moe is None else costs.experts(config, load.tokens, 0, itemsize).flops
    link_rate = plan.link_bytes_per_s or hardware.up_bytes_per_s
    cache_rate = hardware.dram_bytes_per_s if attends == CPU else hardware.accelerator_bytes_per_s
    experts = max(totals.hits + totals.misses, totals.steps * config.num_moe_layers * config.experts_per_token)
    weight_bytes = totals.steps * weight_bytes + experts * costs.expert_bytes(config, plan)
    seconds = {
        LINK: totals.link_bytes / link_rate,
        CACHE: totals.steps * kv_bytes / cache_rate,
        WEIGHTS: weight_bytes / hardware.accelerator_bytes_per_s,
        ACCELERATOR: totals.steps * flops[ACCELERATOR] / hardware.accelerator_flops(dtype),
        CPU: totals.steps * flops[CPU] / hardware.cpu_flops(dtype),
    }
    if hardware.accelerator_is_cpu or attends == ACCELERATOR:
        seconds[READS] = seconds[CACHE] + seconds[WEIGHTS]  # of one memory
    if hardware.accelerator_is_cpu:
        seconds |= {ACCELERATOR: seconds[ACCELERATOR] + seconds[CPU], CPU: 0.0}
    floor_s, binding = max(seconds.values()), max(seconds, key=seconds.__getitem__)
    wall = totals.decode_s
    return {
        "floor_s": floor_s,
        "fraction_of_floor": floor_s / wall,
        "binding_resource": binding,
        "floor_parts_s": seconds,
        "rates": {
            "link_bytes_per_s": totals.link_bytes / wall,
            "cache_bytes_per_s": totals.steps * kv_bytes / wall,
            "weight_bytes_per_s": weight_bytes / wall,
            "flops_per_s": totals.steps * sum(flops.values()) / wall,
        },
    }


def predicted_figures(prediction, totals: Totals) -> dict:
    """The planner's prediction of a step, reported beside the measurement."""
    return {
        "predicted": {
            "step_s": prediction.iteration_s,
            "draft_s": prediction.draft_s,
            "tokens_per_step": prediction.tokens_per_step,
            "tokens_per_s": prediction.tokens_per_s,
            "binding_resource": prediction.binding,
        },
        "step_s": totals.decode_s / totals.steps if totals.steps else None,
    }
