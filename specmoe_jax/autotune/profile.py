"""Measures the engine on this machine, over random weights: its pieces alone, its layers and drafts inside real steps.

Nothing of a checkpoint is read: the compiled programs are those that the model will run, because they depend on its config alone.
Kept on disk per machine and model shape.
"""

import dataclasses
import hashlib
import statistics
from collections.abc import Callable

import jax

from specmoe_jax.autotune import step_bench
from specmoe_jax.autotune.operator_bench import SHAPES, OperatorBench
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.model import random_model
from specmoe_jax.ops import chosen_kernels, isas
from specmoe_jax.planner.flows.pooled import without_kernel
from specmoe_jax.planner.measured.operators import Operators, Sample, fit
from specmoe_jax.support.cache_files import machine_key, read_cached, write_cached
from specmoe_jax.support.jax_settings import lenient
from specmoe_jax.support.progress import bar

VERSION = 8  # of the file format
MOST_BYTES = 1 << 28  # of the experts of a layer; of larger ones fewer are made
MOST_LAYERS = 8  # as many as the model has, where their experts take twice that; at least two, to run one after the other


@lenient()
def profile(
    config: ModelConfig,
    dtype: str = "float32",
    *,
    fresh: bool = False,
    progress: str | bool = False,
    on_round: Callable[[], object] = lambda: None,
) -> Operators:
    """The operators of a model of this shape, measured here or by an earlier run. fresh: measure again. progress: a bar meanwhile.

    on_round: called after each of the rounds in which everything is measured once.
    Deviation: layers are taken to be alike, as the first one with experts; an encoder is not measured.
    """
    found = None if fresh else cached_profile(config, dtype)
    if found is None:
        found = _measure(config, dtype, progress, on_round)
        write_cached("operators", _key(config, dtype), found.to_dict())
    return found


def cached_profile(config: ModelConfig, dtype: str) -> Operators | None:
    """The measurement of an earlier run, None without one."""
    return Operators.from_dict(read_cached("operators", _key(config, dtype)) or {})


def computes_on_host(config: ModelConfig) -> bool:
    """Whether a plan may have a host_share here."""
    return bool(isas()) and without_kernel(config, Plan(preset="probe")) is None


def _key(config: ModelConfig, dtype: str) -> str:
    """A key of everything that the programs depend on."""
    small = _small(config)
    shape = hashlib.sha256(repr((small.layers, config.vocab_size, config.hidden_size, config.num_experts)).encode()).hexdigest()
    device = jax.local_devices()[0].device_kind
    return machine_key("operators", VERSION, shape, dtype, jax.__version__, device, *chosen_kernels())


def _measure(config: ModelConfig, dtype: str, progress: str | bool, on_round: Callable[[], object]) -> Operators:
    model = random_model(_small(config), dtype=dtype)
    layer_bytes, hosts = model.config.num_experts * model.expert_bytes, computes_on_host(model.config)
    cases = step_bench.cases(model.config.num_experts, layer_bytes, config.max_positions, hosts=hosts)
    with bar("profile", 2 + step_bench.ROUNDS * len(cases), "measurement", mode=progress) as shown:
        bench = OperatorBench(model)
        first = _alone(bench)
        shown.update()
        ran = step_bench.run(model, cases, on_case=shown.update, on_round=on_round)
        second = _alone(bench)  # disturbances only add time, so the quicker one counts
        shown.update()
    quicker = {name: [min(pair, key=lambda s: s.seconds) for pair in zip(first[name], second[name], strict=True)] for name in first}
    costs = {name: fit(name, samples) for name, samples in quicker.items()}
    costs |= step_bench.fit_steps(model.config, ran, costs)
    return Operators(costs=costs, expert_bytes=model.expert_bytes, spread=statistics.median(bench.spreads))


def _alone(bench: OperatorBench) -> dict[str, list[Sample]]:
    """The engine's pieces, a few shapes each."""
    return {
        "attention": [bench.attention(*shape, length) for shape in SHAPES for length in bench.lengths],
        "pre_attention": [bench.pre_attention(*shape) for shape in SHAPES],
        "attend_paged": [bench.attend_paged(*shape, length) for shape in SHAPES for length in bench.lengths],
        "post_attention": [bench.post_attention(*shape) for shape in SHAPES],
        "experts": [bench.experts(*shape, share) for shape in SHAPES for share in (0.4, 1.0)],
        "head": [bench.head(*shape) for shape in SHAPES],
        "draft_head": [bench.draft_head(rows) for rows in sorted({rows for rows, _ in SHAPES})],
        "stream": [bench.stream()],
    }


def _small(config: ModelConfig) -> ModelConfig:
    """A few layers like the first one with experts, with fewer of them where they are large, and none of them packed."""
    config = config.with_packing(None)
    layer = config.layers[config.moe_layers[0]]
    each = config.expert_params * 4
    experts = min(config.num_experts, max(config.experts_per_token, MOST_BYTES // each))
    if experts < config.num_experts:
        layer = dataclasses.replace(layer, router=dataclasses.replace(layer.own_router, num_experts=experts, groups=None))
    layers = max(min(config.num_layers, MOST_LAYERS, 2 * MOST_BYTES // (experts * each)), 2)
    return dataclasses.replace(config, num_layers=layers, num_experts=experts, layer_configs=(layer,) * layers)
