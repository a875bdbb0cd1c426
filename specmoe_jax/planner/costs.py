"""The cost of each operation of a pass as a function of shapes (SpecMoEOff, Table 1, and everything else the engine does). Pure.

Flops count a multiplication and an addition as two (the paper's table counts the attention's as one). Sizes of projections are
those of the family's own tensors, whatever the family; norms, biases and softmax are left out.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.rows import rows_of_device
from specmoe_jax.models.experts import mean_bytes
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.spec import DTYPE_BYTES, LayerWeights
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU, DOWN, UP, Task
from specmoe_jax.planner.hardware import Hardware

DISK, PEERS, NETWORK = "disk", "links between devices", "network between hosts"


class Cost(NamedTuple):
    """flops and bytes of the resource's memory (for the link and the disk: bytes that cross it), and how many programs or copies.

    operator: whose efficiency applies, one of hardware.OPERATORS.
    """

    resource: str
    operator: str
    flops: float = 0.0
    bytes: float = 0.0
    programs: int = 1


class Load(NamedTuple):
    """The load of a pass or a micro-batch: sequences, new positions of each, and positions in their caches.

    They are means, so they need not be whole.

    source: positions that an encoder has read of each.
    """

    rows: float
    new: float
    context: float
    source: float = 0.0

    @property
    def tokens(self) -> float:
        return self.rows * self.new


class LayerSizes(NamedTuple):
    """Numbers in the projections before the attention, and after it (router, dense MLP and cross attention among them)."""

    before: int
    after: int


def seconds(cost: Cost, hardware: Hardware, dtype: str) -> float:
    """The slower of arithmetic and memory at their efficiencies, and the fixed costs. Raises KeyError for an unknown resource."""
    compute, memory, overhead_s = hardware.efficiency(cost.operator)
    peak, rate, fixed_s = limits(hardware, dtype)[cost.resource]
    return max(cost.flops / (peak * compute), cost.bytes / (rate * memory)) + cost.programs * (fixed_s + overhead_s)


def bound_seconds(costs: list[Cost], hardware: Hardware, dtype: str) -> float:
    """No schedule can be faster: the busiest resource at its peaks, without fixed costs. Shared cores do one thing at a time."""
    needs = {}
    for resource, (peak, rate, _) in limits(hardware, dtype).items():
        own = [cost for cost in costs if cost.resource == resource]
        needs[resource] = max(sum(cost.flops for cost in own) / peak, sum(cost.bytes for cost in own) / rate)
    cores_s = needs[ACCELERATOR] + needs[CPU] if hardware.accelerator_is_cpu else max(needs[ACCELERATOR], needs[CPU])
    return max(cores_s, needs[UP], needs[DOWN], needs[DISK], needs[PEERS], needs[NETWORK])


def times(count: int, costs: Iterable[Cost]) -> list[Cost]:
    """The costs of as many operations of each kind."""
    return [c._replace(flops=count * c.flops, bytes=count * c.bytes, programs=count * c.programs) for c in costs]


def limits(hardware: Hardware, dtype: str) -> dict[str, tuple[float, float, float]]:
    """Of each resource: peak flop/s, bytes/s, seconds of a program or a copy. A pass waits for the CPU once per attention."""
    accelerator = hardware.accelerator_flops(dtype), hardware.accelerator_bytes_per_s, hardware.task_s
    infinite = float("inf")
    return {
        ACCELERATOR: accelerator,
        CPU: (hardware.cpu_flops(dtype), hardware.dram_bytes_per_s, hardware.sync_s),
        UP: (infinite, hardware.up_bytes_per_s, hardware.copy_s),
        DOWN: (infinite, hardware.down_bytes_per_s, hardware.copy_s),
        DISK: (infinite, hardware.disk_bytes_per_s, 0.0),
        PEERS: (infinite, hardware.peer_bytes_per_s or infinite, hardware.task_s),
        NETWORK: (infinite, hardware.network_bytes_per_s or infinite, hardware.task_s),
    }


@functools.lru_cache(maxsize=64)
def layer_sizes(config: ModelConfig) -> tuple[LayerSizes, ...]:
    """One a layer of the decoder."""
    return tuple(map(_sizes, family_of(config).weight_specs(config).layers))


def _sizes(weights: LayerWeights) -> LayerSizes:
    recurrent = (weights.recurrent.z, weights.recurrent.b, weights.recurrent.a) if weights.recurrent else ()
    indexer = (weights.indexer.q, weights.indexer.k, weights.indexer.heads) if weights.indexer else ()
    before = (weights.q, weights.k, weights.v, weights.q_a, weights.kv_a, *recurrent, *indexer)
    cross = (weights.cross.q, weights.cross.o) if weights.cross else ()
    mlp = (weights.mlp.gate, weights.mlp.up, weights.mlp.down) if weights.mlp else ()
    after = (weights.o, weights.router, weights.shared_gate, *cross, *mlp)
    up = weights.kv_b.size // 2 if weights.kv_b else 0  # of latent attention: half to the query, half to the output
    return LayerSizes(*(sum(spec.size for spec in group if spec) + up for group in (before, after)))


def embed(config: ModelConfig, load: Load, itemsize: int) -> Cost:
    return Cost(ACCELERATOR, "dense", bytes=2 * load.tokens * config.hidden_size * itemsize)


def projections(size: int, load: Load, itemsize: float, *, programs: int = 1) -> Cost:
    """Matrices of `size` numbers applied to the load's tokens."""
    return Cost(ACCELERATOR, "dense", 2 * size * load.tokens, size * itemsize, programs)


def attention(config: AttentionConfig, load: Load, itemsize: int, *, resource: str, programs: int = 1) -> Cost:
    """Scores and mixture over the cache, which is read once for all new positions of a row and all heads of a KV group."""
    context = min(x for x in (load.context + load.new / 2, config.window, config.chunk) if x is not None)
    flops = 4 * load.tokens * context * config.num_heads * config.cache_dim
    read = load.rows * context * cache_row(config)
    if config.kept is not None and context > config.kept:  # index keys once, where it chooses, and of each query what was chosen
        asked, dim = (config.indexer.asked, config.indexer.dim) if config.indexer else (0, 0)
        flops = load.tokens * (2 * context * asked + 4 * config.kept * config.num_heads * config.cache_dim)
        read = load.rows * context * dim + load.tokens * config.kept * cache_row(config)
    operator = "cpu_attention" if resource == CPU else "attention"
    return Cost(resource, operator, flops, read * itemsize, programs)


def recurrence(config: AttentionConfig, load: Load, *, programs: int = 1) -> Cost:
    """A recurrent layer's rule: states in float32 read and written once, and four products with them for each new position.

    Deviation: the products of replayed positions are left out; they share the read.
    """
    assert config.recurrent is not None
    numbers = config.recurrent.state
    moved = 4 * (2 * load.rows * numbers + 2 * load.tokens * config.recurrent.row)
    return Cost(ACCELERATOR, "attention", 8 * load.tokens * numbers, moved, programs)


def cross_attention(config: AttentionConfig, load: Load, itemsize: int) -> Cost:
    """Over what an encoder has read, on the accelerator. Its projections are counted with those after the attention."""
    flops = 4 * load.tokens * load.source * config.num_heads * config.head_dim
    return Cost(ACCELERATOR, "attention", flops, load.rows * load.source * cache_row(config) * itemsize, 0)


def expert_bytes(config: ModelConfig, plan: Plan) -> int:
    """Of one expert in memory and on the link, quantised or not; the mean where layers differ."""
    return mean_bytes(config, plan.dtype, plan.expert_dtype)


def cache_row(config: AttentionConfig) -> int:
    """Numbers of keys and values of one position."""
    return 2 * config.cache_row


def experts(
    config: ModelConfig,
    tokens: float,
    distinct: float,
    itemsize: int,
    *,
    expert_bytes: float | None = None,
    programs: int = 1,
    share: float = 1.0,
) -> Cost:
    """The chosen experts' FFN: every different one is read once. expert_bytes: where it is not `itemsize` a number.

    distinct: those that a device reads. share: of all chosen pairs of token and expert, those that it computes.
    """
    one = config.expert_params * itemsize if expert_bytes is None else expert_bytes
    flops = 2 * config.experts.params * config.experts_per_token * tokens * share
    moved = 2 * tokens * config.experts_per_token * config.hidden_size * itemsize
    return Cost(ACCELERATOR, "experts", flops, distinct * one + moved, programs)


def host_experts(config: ModelConfig, tokens: float, count: float, expert_bytes: float, share: float, hardware: Hardware) -> Cost:
    """`count` absent experts on the host's cores, which read each once; share: of all pairs of token and choice, theirs.

    The host's kernels are of one kind, so where no probe has timed its experts they reach what its attention does.
    """
    flops = 2 * config.experts.params * config.experts_per_token * tokens * share
    operator = "experts" if hardware.accelerator_is_cpu else "cpu_attention"
    return Cost(CPU, operator, flops, count * expert_bytes)


def own_load(load: Load, plan: Plan) -> Load:
    """What a device attends of it: its share of the rows, where they are divided."""
    rows = load.rows if plan.cache_tier.on_host else rows_of_device(load.rows, plan.devices)
    return load._replace(rows=rows)


def gather(config: ModelConfig, load: Load, plan: Plan, hosts: int) -> list[Cost]:
    """What devices exchange around a layer's experts: outputs in float32 of every pair of token and choice.

    Where rows are divided, the experts' inputs of all rows to each device, and to each the outputs of its rows (a reduce-scatter);
    else all outputs to each (an all-reduce, twice as much).
    """
    outputs = 4 * load.tokens * config.experts_per_token * config.hidden_size
    if own_load(load, plan) == load:
        return exchanged(2 * outputs, plan.devices, hosts)
    return exchanged(outputs + load.tokens * config.hidden_size * DTYPE_BYTES[plan.dtype], plan.devices, hosts)


def gather_logits(config: ModelConfig, load: Load, plan: Plan, hosts: int) -> list[Cost]:
    """Those of all rows to each device, where each computes those of its own."""
    own = own_load(load, plan) == load
    return [] if own else exchanged(4 * load.tokens * config.vocab_size, plan.devices, hosts)


def exchanged(size: float, devices: int, hosts: int) -> list[Cost]:
    """`size` bytes, of which each device has a part, on all of them.

    Between hosts each device sends a part, so that all of a host's network is used.
    """
    if devices == 1:
        return []
    within = Cost(PEERS, "copy", bytes=size * (devices - 1) / devices)
    return [within] if hosts == 1 else [within, Cost(NETWORK, "copy", bytes=size * (hosts - 1) / hosts)]


def fetch(expert_bytes: float, count: float, *, operator: str = "stream", resource: str = UP) -> Cost:
    """`count` experts over the link, or from disk, a copy each."""
    return Cost(resource, operator, bytes=count * expert_bytes, programs=max(round(count), 1) if count else 0)


def queries_down(config: AttentionConfig, load: Load, itemsize: int) -> Cost:
    """Queries, keys and values of the new positions to the host."""
    numbers = config.num_heads * config.query_dim + 2 * config.num_kv_heads * config.head_dim
    return Cost(DOWN, "copy", bytes=load.tokens * numbers * itemsize)


def keys_down(config: AttentionConfig, load: Load, itemsize: int) -> Cost:
    """Keys and values of prompts that attend on the accelerator, to the host."""
    return Cost(DOWN, "copy", bytes=load.tokens * cache_row(config) * itemsize)


def append(config: AttentionConfig, load: Load, itemsize: int) -> Cost:
    """Those into the host's cache: read and written."""
    return Cost(CPU, "cpu_attention", bytes=2 * load.tokens * cache_row(config) * itemsize)


def attended_up(config: AttentionConfig, load: Load, itemsize: int) -> Cost:
    """The outputs of the CPU's attention, back."""
    return Cost(UP, "copy", bytes=load.tokens * (config.num_heads * config.head_dim + config.told_numbers) * itemsize)


def head(config: ModelConfig, tokens: float, itemsize: float) -> Cost:
    """Logits, float32, and the choice among them. itemsize: of the output matrix."""
    size = config.vocab_size * config.hidden_size
    return Cost(ACCELERATOR, "dense", 2 * size * tokens, size * itemsize + 2 * tokens * config.vocab_size * 4)


def task_cost(
    config: ModelConfig, task: Task, load: Load, *, streamed: float, itemsize: int, dense: float, expert_bytes: float
) -> Cost:
    """Of one task of a streamed pass (offload/stream_schedule.py), but for the experts' own.

    streamed: experts of a copy. dense: bytes of a number of a dense matrix.
    """
    layer, sizes = config.layers[task.layer], layer_sizes(config)[task.layer]
    return {
        "embed": lambda: embed(config, load, itemsize),
        "pre_attention": lambda: projections(sizes.before, load, dense),
        "to_host": lambda: queries_down(layer.attention, load, itemsize),
        "attention": lambda: attention(layer.attention, load, itemsize, resource=CPU),
        "to_accelerator": lambda: attended_up(layer.attention, load, itemsize),
        "post_attention": lambda: projections(sizes.after, load, dense),
        "stream": lambda: fetch(expert_bytes, streamed),
        "attend_chunk": lambda: attention(layer.attention, load, itemsize, resource=ACCELERATOR),
        "store": lambda: keys_down(layer.attention, load, itemsize),
        "append": lambda: append(layer.attention, load, itemsize),
        "recur": lambda: recurrence(layer.attention, load),
    }[task.kind]()
