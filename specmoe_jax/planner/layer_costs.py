"""Costs of a layer and of a resident pass, piece by piece in the order in which they run, for the target and for drafts. Pure."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.kv_cache.tiers import KvTierDescription
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner import costs
from specmoe_jax.planner.costs import Cost, Load


def resident_pass(
    config: ModelConfig,
    load: Load,
    distinct: float,
    itemsize: int,
    *,
    tier: KvTierDescription,
    expert_bytes: float | None = None,
    own: Load | None = None,
) -> tuple[Cost, ...]:
    """All layers and the head without a copy of an expert. distinct: experts of a layer that are used.

    own: what of the load is not the experts', where a device attends a part of the rows.
    """
    own = load if own is None else own
    found = [costs.embed(config, own, itemsize)]
    for index in range(config.num_layers):
        found += attention_block(config, index, own, itemsize, tier=tier)
        if config.moe_index[index] is not None:
            programs = int(tier.on_host)
            found.append(costs.experts(config, load.tokens, distinct, itemsize, expert_bytes=expert_bytes, programs=programs))
    return (*found, costs.head(config, own.tokens, itemsize))


def attention_block(config: ModelConfig, index: int, load: Load, itemsize: int, *, tier: KvTierDescription) -> list[Cost]:
    """A layer up to its router: one program with a cache on the accelerator, else three and two copies."""
    layer, sizes = config.layers[index], costs.layer_sizes(config)[index]
    if layer.attention.recurrent is not None:
        before, after = (costs.projections(size, load, itemsize, programs=1 - i) for i, size in enumerate(sizes))
        return [before, costs.recurrence(layer.attention, load, programs=0), after]
    on_cpu = tier.on_host
    attend = costs.attention(layer.attention, load, itemsize, resource=CPU if on_cpu else ACCELERATOR, programs=int(on_cpu))
    around = [costs.queries_down(layer.attention, load, itemsize)], [costs.attended_up(layer.attention, load, itemsize)]
    before, after = around if on_cpu else ([], [])
    return [
        costs.projections(sizes.before, load, itemsize),
        *before,
        attend,
        *after,
        *([costs.cross_attention(layer.cross, load, itemsize)] if layer.cross else []),
        costs.projections(sizes.after, load, itemsize, programs=int(on_cpu)),
    ]
