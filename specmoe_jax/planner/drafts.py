"""What drafting takes, by kind of draft, as costs of its pieces in the order in which they run. Pure."""

from typing import NamedTuple

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig, Rope
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.tiers import ACCELERATOR as ACCELERATOR_KV
from specmoe_jax.kv_cache.tiers import KvTier
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.memory.memory_account import DraftMemory


class DraftCosts(NamedTuple):
    """costs: one after the other. syncs: how often the host waits meanwhile. memory: on the accelerator, of its own.

    split: attentions of a cache that is in two places, each on the accelerator and, at the same time, the chain of the CPU's part.
    """

    costs: tuple[Cost, ...]
    split: tuple[tuple[Cost, tuple[Cost, ...]], ...] = ()
    syncs: int = 1
    memory: DraftMemory = DraftMemory()


NOTHING = DraftCosts(costs=(), syncs=0)


def draft_costs(
    config: ModelConfig,
    plan: Plan,
    load: Load,
    *,
    skew: float,
    head: EagleConfig | None,
    model: ModelConfig | None,
    cpu_share: float = 0.0,
) -> DraftCosts:
    """Of `plan.draft_length` tokens for each of `load.rows` sequences.

    head: of draft=eagle, None for `usual_head`. model: the configuration of draft=model. cpu_share: of the rows, whose draft
    attends on the CPU (draft=eagle). A custom draft and prompt lookup take nothing: what they do on the host is in Hardware.step_s.
    """
    itemsize, length = DTYPE_BYTES[plan.dtype], plan.draft_length or 0
    one = Load(load.rows, 1, load.context + length / 2)
    if not length or plan.draft in ("none", "ngram", "custom"):
        return NOTHING
    if plan.draft in ("self", "merged"):
        resident = plan.draft_experts if isinstance(plan.draft_experts, int) else sum(plan.draft_experts) / config.num_moe_layers
        used = min(
            routing.distinct(routing.choice_probabilities(config.num_experts, config.experts_per_token, skew), load.rows), resident
        )
        token = resident_pass(config, one, used, itemsize, tier=plan.cache_tier, expert_bytes=costs.expert_bytes(config, plan))
        return DraftCosts(token * length, syncs=length if plan.prefetch == "draft" else 1)
    if plan.draft == "model":
        return _model_costs(model, plan, load, one, itemsize)
    return _eagle_costs(config, plan, head or usual_head(config), load, one, cpu_share)


def resident_pass(
    config: ModelConfig, load: Load, distinct: float, itemsize: int, *, tier: KvTier, expert_bytes: float | None = None
) -> tuple[Cost, ...]:
    """All layers and the head without a copy of an expert. distinct: experts of a layer that are used."""
    found = [costs.embed(config, load, itemsize)]
    for index in range(config.num_layers):
        found += attention_block(config, index, load, itemsize, tier=tier)
        if config.moe_index[index] is not None:
            programs = int(tier.on_host)
            found.append(costs.experts(config, load.tokens, distinct, itemsize, expert_bytes=expert_bytes, programs=programs))
    return (*found, costs.head(config, load.tokens, itemsize))


def attention_block(config: ModelConfig, index: int, load: Load, itemsize: int, *, tier: KvTier) -> list[Cost]:
    """A layer up to its router: one program with a cache on the accelerator, else three and two copies."""
    layer, sizes = config.layers[index], costs.layer_sizes(config)[index]
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


def usual_head(config: ModelConfig) -> EagleConfig:
    """An EAGLE-1 head in the shape of the published one for Mixtral: the target's attention with a KV head for each query head
    (16 KiB of float16 cache a token there), a dense MLP of 3.5 times its width."""
    heads = max(config.hidden_size // 128, 1)
    layer = config.layers[0]
    head_dim = config.hidden_size // heads
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=head_dim**-0.5, rope=Rope.plain(1e4, head_dim)
    )
    dense = LayerConfig(
        attention=attention, router=None, experts=None, norm_eps=layer.norm_eps, mlp_hidden=config.hidden_size * 7 // 2
    )
    return EagleConfig(layer=dense, hidden_size=config.hidden_size, bias=True)


def _eagle_costs(config, plan: Plan, head: EagleConfig, load: Load, one: Load, cpu_share: float) -> DraftCosts:
    """The head reads the pass's committed tokens (padded to all of the pass's), then feeds back its own; an output matrix each.

    Of a tree it feeds back a level of draft_tree_top_k nodes at a time. Of a split cache each part attends over its own rows.
    """
    itemsize, width = DTYPE_BYTES[plan.dtype], plan.draft_tree_top_k or 1
    attention, levels = head.layer.attention, plan.draft_length - 1
    size = sum(spec.size for spec in spec_leaves(eagle_config.weight_specs(head)))
    level = one._replace(new=width)

    def attend(of: Load, share: float, resource: str = ACCELERATOR) -> Cost:
        return costs.attention(attention, of._replace(rows=of.rows * share), itemsize, resource=resource, programs=0)

    def both(of: Load) -> tuple[Cost, tuple[Cost, ...]]:
        copies = costs.queries_down(attention, of, itemsize), costs.attended_up(attention, of, itemsize)  # of all rows: one shape
        return attend(of, 1 - cpu_share), (copies[0], attend(of, cpu_share, CPU), copies[1])

    here = (lambda of: ()) if cpu_share else (lambda of: (attend(of, 1.0),))
    first = (costs.projections(size, load, itemsize), *here(load), costs.head(config, load.rows, itemsize))
    further = (costs.projections(size, level, itemsize), *here(level), costs.head(config, load.rows * width, itemsize))
    return DraftCosts(
        costs=(*first, *(further * levels)),
        split=(both(load), *((both(level),) * levels)) if cpu_share else (),
        memory=eagle_memory(head, itemsize),
    )


def draft_memory(config: ModelConfig, plan: Plan, *, head: EagleConfig | None, model: ModelConfig | None) -> DraftMemory:
    """Of the draft that a plan names. head, model: see `draft_costs`."""
    if plan.draft == "eagle":
        return eagle_memory(head or usual_head(config), DTYPE_BYTES[plan.dtype])
    if plan.draft == "model" and model is not None:
        return model_memory(model, _resident(plan))
    return DraftMemory()


def eagle_memory(head: EagleConfig, itemsize: int) -> DraftMemory:
    """Of a head. itemsize: bytes of a number."""
    size = sum(spec.size for spec in spec_leaves(eagle_config.weight_specs(head)))
    return DraftMemory(
        fixed=size * itemsize, row=head.hidden_size * itemsize, position=costs.cache_row(head.layer.attention) * itemsize
    )


def model_memory(model: ModelConfig, plan: Plan) -> DraftMemory:
    """Of a draft model that runs as the resident preset does: linear in rows, and in rows times positions."""

    def held(rows: int, positions: int) -> int:
        return account(model, plan, batch_rows=rows, positions=positions).accelerator_bytes

    fixed = held(0, 0)
    return DraftMemory(fixed=fixed, row=held(1, 0) - fixed, position=held(1, 1) - held(1, 0))


def _model_costs(model: ModelConfig, plan: Plan, load: Load, one: Load, itemsize: int) -> DraftCosts:
    """It first reads what was committed (padded to all of the pass's), then writes."""
    used = float(model.num_experts) if model.num_moe_layers else 0.0
    catch_up = resident_pass(model, load, used, itemsize, tier=ACCELERATOR_KV)
    token = resident_pass(model, one, min(used, load.rows * model.experts_per_token), itemsize, tier=ACCELERATOR_KV)
    return DraftCosts(costs=(*catch_up, *(token * ((plan.draft_length or 1) - 1))), memory=model_memory(model, _resident(plan)))


def _resident(plan: Plan) -> Plan:
    """How a draft model runs."""
    return Plan(preset="resident", expert_flow="resident", dtype=plan.dtype, prefill_chunk=plan.prefill_chunk)
