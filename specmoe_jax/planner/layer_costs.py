"""Costs of a layer, piece by piece in the order in which they run, and of a resident pass, for the target and for drafts. Pure."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.kv_cache.tiers import KvTierDescription
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner import costs
from specmoe_jax.planner.costs import Cost, Load


class Alike(NamedTuple):
    """Layers that cost the same: one of them, its place among those with experts or None, and how many they are."""

    index: int
    moe: int | None
    count: int


def layers_alike(config: ModelConfig, kept: Sequence[int] = ()) -> tuple[Alike, ...]:
    """The layers of a model by kind: a search looks at thousands of passes, and most models have one or two kinds.

    kept: of each layer with experts, how many stay on the accelerator, where that makes layers unlike.
    """
    sizes, kinds = costs.layer_sizes(config), collections.defaultdict(list)
    for index, (layer, moe) in enumerate(zip(config.layers, config.moe_index, strict=True)):
        kinds[layer, sizes[index], kept[moe] if kept and moe is not None else None].append(index)
    return tuple(Alike(found[0], config.moe_index[found[0]], len(found)) for found in kinds.values())


def resident_pass(
    config: ModelConfig,
    load: Load,
    distinct: float,
    itemsize: int,
    *,
    tier: KvTierDescription,
    dense: float | None = None,
    expert_bytes: float | None = None,
    own: Load | None = None,
) -> tuple[Cost, ...]:
    """All layers, alike ones together, and the head, without a copy of an expert. distinct: experts of a layer that are used.

    dense: bytes of a number of a dense matrix, where it is not `itemsize`. own: what of the load is not the experts', where a
    device attends a part of the rows.
    """
    own, dense = load if own is None else own, dense or itemsize
    found = [costs.embed(config, own, itemsize)]
    for index, moe, count in layers_alike(config):
        layer = attention_block(config, index, own, itemsize, dense=dense, tier=tier)
        if moe is not None:
            programs = int(tier.on_host)
            layer.append(costs.experts(config, load.tokens, distinct, itemsize, expert_bytes=expert_bytes, programs=programs))
        found += costs.times(count, layer)
    return (*found, costs.head(config, own.tokens, dense))


def attention_block(
    config: ModelConfig, index: int, load: Load, itemsize: int, *, dense: float, tier: KvTierDescription
) -> list[Cost]:
    """A layer up to its router: one program with a cache on the accelerator, else three and two copies.

    dense: bytes of a number of a dense matrix.
    """
    layer, sizes = config.layers[index], costs.layer_sizes(config)[index]
    if layer.attention.recurrent is not None:
        before, after = (costs.projections(size, load, dense, programs=1 - i) for i, size in enumerate(sizes))
        return [before, costs.recurrence(layer.attention, load, programs=0), after]
    on_cpu = tier.on_host
    attend = costs.attention(layer.attention, load, itemsize, resource=CPU if on_cpu else ACCELERATOR, programs=int(on_cpu))
    around = [costs.queries_down(layer.attention, load, itemsize)], [costs.attended_up(layer.attention, load, itemsize)]
    before, after = around if on_cpu else ([], [])
    return [
        costs.projections(sizes.before, load, dense),
        *before,
        attend,
        *after,
        *([costs.cross_attention(layer.cross, load, itemsize)] if layer.cross else []),
        costs.projections(sizes.after, load, dense, programs=int(on_cpu)),
    ]
