"""Measures the engine's own operators on this machine, a few shapes each, over two layers of a model with random weights.

Nothing of a checkpoint is read: the compiled programs are those that the model will run, because they depend on its config alone.
Kept on disk per machine and model shape.
"""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.cache_files import machine_key, read_cached, write_cached
from specmoe_jax.config import ModelConfig, Plan, SamplingParams
from specmoe_jax.engine import stages
from specmoe_jax.engine.forward import attention, migrate_and_compute, resident_layer
from specmoe_jax.engine.generate import Engine
from specmoe_jax.engine.runtime import build, first_memory, new_cache
from specmoe_jax.models.model import random_model
from specmoe_jax.ops import empty_cache
from specmoe_jax.planner.memory import KV_PAGE, account, pages_of
from specmoe_jax.planner.operators import Operators, Sample, fit
from specmoe_jax.speculate.acceptance import accept_greedy, finite_positions
from specmoe_jax.types import Routing

LAYERS = 2  # enough to run one after the other
MOST_BYTES = 1 << 28  # of the experts of a layer; of larger ones fewer are made
SHAPES = ((1, 1), (1, 5), (4, 3), (16, 1), (16, 5), (64, 1), (64, 5))  # rows B and positions T of a pass
ROWS = tuple(sorted({rows for rows, _ in SHAPES}))
STEP_ROWS, STEPS = (1, 4, 16, 64), 16  # of real steps: batches, and how many of each
CHAIN = 8  # programs issued one after the other before the host waits
BUDGET_S, LEAST = 0.03, 5  # of the repetitions of one shape, after one that compiles


def profile(config: ModelConfig, dtype: str = "float32", *, fresh: bool = False) -> Operators:
    """The operators of a model of this shape, measured here or by an earlier run. fresh: measure again.

    Deviation: layers are taken to be alike, as the first one with experts; an encoder is not measured.
    """
    key = machine_key("operators", 5, _shape_key(config), dtype, jax.__version__, jax.devices()[0].device_kind)
    found = None if fresh else Operators.from_dict(read_cached("operators", key) or {})
    if found is None:
        found = _measure(config, dtype)
        write_cached("operators", key, found.to_dict())
    return found


def cached_profile(config: ModelConfig, dtype: str) -> Operators | None:
    """What an earlier run measured, None if none did."""
    key = machine_key("operators", 5, _shape_key(config), dtype, jax.__version__, jax.devices()[0].device_kind)
    return Operators.from_dict(read_cached("operators", key) or {})


def _shape_key(config: ModelConfig) -> str:
    """Of what the programs depend on."""
    layer = config.layers[config.moe_layers[0]]
    return hashlib.sha256(repr((layer, config.vocab_size, config.hidden_size, config.num_experts)).encode()).hexdigest()


def _measure(config: ModelConfig, dtype: str) -> Operators:
    bench = _Bench(config, dtype)
    samples = {
        "attention": [bench.attention(*shape, length) for shape in SHAPES for length in bench.lengths],
        "layer": [bench.layer(*shape, length) for shape in SHAPES for length in bench.lengths],
        "pre_attention": [bench.pre_attention(*shape) for shape in SHAPES],
        "attend_paged": [bench.attend_paged(*shape, length) for shape in SHAPES for length in bench.lengths],
        "post_attention": [bench.post_attention(*shape) for shape in SHAPES],
        "experts": [bench.experts(*shape, share) for shape in SHAPES for share in (0.4, 1.0)],
        "head": [bench.head(*shape) for shape in SHAPES],
        "draft_head": [bench.draft_head(rows) for rows in ROWS],
        "stream": [bench.stream()],
    }
    costs = {name: fit(name, found) for name, found in samples.items()}
    migrating = [bench.migrate(*shape, share) for shape in SHAPES for share in (0.4, 1.0)]
    costs["migrate"] = fit("migrate", [_beside(costs["experts"], sample) for sample in migrating])
    costs["step"] = fit("step", [bench.step(rows, costs) for rows in STEP_ROWS])
    for name, found in bench.layers_in_steps(costs).items():
        costs[name] = fit(name, found)
    return Operators(costs=costs, expert_bytes=bench.model.expert_bytes, spread=statistics.median(bench.spreads))


def _beside(experts, sample: Sample) -> Sample:
    """What of a measured layer is not its experts."""
    return Sample(sample.work, max(sample.seconds - experts(**sample.work), 1e-6))


class _Bench:
    """A small model, runtimes of a resident, an on_demand and a streamed plan, and one method per operator."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.model = random_model(_small(config), dtype=dtype)
        self.config = self.model.config
        self.layer_config = self.config.layers[0]
        self.spreads: list[float] = []
        room = config.max_positions - max(new for _, new in SHAPES) - 1
        self.lengths = tuple(sorted({max(1, min(length, room)) for length in (48, 448)}))
        self.positions = self.lengths[-1] + max(new for _, new in SHAPES)
        self.resident = self._runtime(Plan(preset="probe", expert_flow="resident", dtype=dtype))
        self.on_demand = self._runtime(Plan(preset="probe", dtype=dtype))
        self.streams = self._runtime(Plan(preset="probe", expert_flow="stream", kv_tier="host", dtype=dtype))
        self.pool, self.memory = first_memory(self.resident).pool, first_memory(self.on_demand)

    def _runtime(self, plan: Plan):
        rows = max(ROWS)
        needed = account(self.config, plan.replace(batch_size=rows), batch_rows=rows, positions=self.positions)
        return build(self.model, plan, needed, None, earlier=None, progress=False)

    def attention(self, rows: int, new: int, length: int) -> Sample:
        kv, (h, lengths, num_new) = self._cache(rows), self._inputs(rows, new, length)

        def call():
            nonlocal kv
            _, _, routing, k, v = attention(self.on_demand, 0, h, kv, lengths, num_new)
            kv = kv._replace(k=(k,), v=(v,))
            return np.asarray(routing.ids)

        return self._sample(call, rows, new, length)

    def layer(self, rows: int, new: int, length: int) -> Sample:
        kv, (h, lengths, num_new) = self._cache(rows), self._inputs(rows, new, length)
        pool, slots = self.pool, self.resident.resident_slots[0]

        def call():
            nonlocal kv
            out = h
            for _ in range(CHAIN):
                out, ids, k, v = resident_layer(self.resident, 0, out, kv, lengths, num_new, pool, slots)
                kv = kv._replace(k=(k,), v=(v,))
            jax.block_until_ready(out)
            return ids

        return self._sample(call, rows, new, length, blocks=len(np.unique(np.asarray(call()))), chain=CHAIN)

    def pre_attention(self, rows: int, new: int) -> Sample:
        h, lengths, _ = self._inputs(rows, new, self.lengths[0])
        return self._sample(lambda: stages.pre_attention(self.layer_config, self._weights, h, lengths), rows, new)

    def attend_paged(self, rows: int, new: int, length: int) -> Sample:
        h, lengths, num_new = self._inputs(rows, new, length)
        projected, each = stages.pre_attention(self.layer_config, self._weights, h, lengths), pages_of(self.positions)
        attends = self.layer_config.attention
        cache = empty_cache(rows * each, attends.num_kv_heads, KV_PAGE, attends.cache_dim, self.model.dtype)
        table = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
        host = jax.device_put((*projected, self._weights.sinks, cache, table, lengths, num_new), self.streams.host)
        *inputs, cache, table, lengths, num_new = host

        def call():
            nonlocal cache
            out, cache = stages.attend_paged(self.layer_config, *inputs, cache, table, lengths, num_new)
            return out

        return self._sample(call, rows, new, length)

    def post_attention(self, rows: int, new: int) -> Sample:
        h, lengths, num_new = self._inputs(rows, new, self.lengths[0])
        attended = jnp.zeros_like(stages.pre_attention(self.layer_config, self._weights, h, lengths)[0])
        return self._sample(lambda: stages.post_attention(self.layer_config, self._weights, h, attended, num_new), rows, new)

    def experts(self, rows: int, new: int, share: float) -> Sample:
        h, x, routing, used = self._routed(rows, new, share)
        pool, slots = self.pool, self.resident.resident_slots[0]
        return self._sample(lambda: stages.experts(self.layer_config, h, x, routing, pool, slots), rows, new, blocks=used)

    def migrate(self, rows: int, new: int, share: float) -> Sample:
        """A layer's experts with none of them resident: plan, copies, computation."""
        rt, (h, x, routing, used) = self.on_demand, self._routed(rows, new, share)
        nothing = np.zeros((self.config.num_moe_layers, self.config.num_experts), np.int64)

        def call():
            out, self.memory, _ = migrate_and_compute(rt, 0, self.memory, h, x, routing, nothing[0], nothing)
            return out

        return self._sample(call, rows, new, blocks=used, misses=used)

    def head(self, rows: int, new: int) -> Sample:
        h, _, _ = self._inputs(rows, new, self.lengths[0])
        drafted = np.zeros((rows, new - 1), np.int32)

        def call():
            logits = stages.head(self.config.norm_eps, self.model.weights, h)
            return jax.device_get((_accept(drafted, logits), _finite(logits)))

        return self._sample(call, rows, new)

    def draft_head(self, rows: int) -> Sample:
        token = np.zeros((rows, 1), np.int32)

        def call():
            out = token
            for _ in range(CHAIN):
                logits = stages.head(self.config.norm_eps, self.model.weights, stages.embed(self.model.weights, out))
                out = _argmax(logits)
            return out

        return self._sample(call, rows, 1, chain=CHAIN)

    def stream(self) -> Sample:
        buffer = self.streams.store.new_buffer()

        def call():
            nonlocal buffer
            buffer = self.streams.store.stream(buffer, 0)
            return buffer

        return self._sample(call, 1, 1, blocks=self.config.num_experts)

    def step(self, rows: int, costs: dict) -> Sample:
        """Whole steps of a resident plan, less the operators in them."""
        work, _, seconds = self._steps(rows, expert_flow="resident")
        used = min(self.config.num_experts, rows * self.config.experts_per_token)
        known = costs["layer"](**work | {"blocks": used}) * LAYERS + costs["head"](**work)
        return Sample(work, max(seconds - known, 1e-6))

    def layers_in_steps(self, costs: dict) -> dict[str, list[Sample]]:
        """Of real steps, less the head and what every step takes, a layer's share; of drafts, less layers and head, a token's."""
        found = {"lookup": [], "on_demand_layer": [], "streamed_layer": [], "drafted_token": []}
        looked_up = {"draft": "ngram", "draft_length": 3}
        for rows in STEP_ROWS:
            for plan in ({}, {"cached_experts": -(-self.config.num_experts // 2)}, looked_up):
                work, draft_s, seconds = self._steps(rows, **plan)
                found["on_demand_layer"].append(self._layer_of(costs, work, draft_s, seconds))
                found["lookup"] += [Sample(work, draft_s)] if plan is looked_up else []
            for plan in ({}, looked_up):
                found["streamed_layer"].append(
                    self._layer_of(costs, *self._steps(rows, expert_flow="stream", kv_tier="host", **plan))
                )
            drafts = {"draft": "self", "draft_length": 3, "draft_experts": -(-self.config.num_experts // 3)}
            work, draft_s, seconds = self._steps(rows, **drafts)
            found["on_demand_layer"].append(self._layer_of(costs, work, draft_s, seconds))
            one = {"rows": rows, "tokens": rows, "read": work["read"], "scores": work["read"], "blocks": drafts["draft_experts"]}
            token_s = draft_s / 3 - costs["draft_head"](**one) - LAYERS * costs["layer"](**one)
            found["drafted_token"].append(Sample(work, max(token_s, 1e-6)))
        return found

    def _layer_of(self, costs: dict, work: dict, draft_s: float, seconds: float) -> Sample:
        layers_s = seconds - draft_s - costs["head"](**work) - costs["step"](**work)
        return Sample(work, max(layers_s / LAYERS, 1e-6))

    def _steps(self, rows: int, **plan) -> tuple[dict[str, float], float, float]:
        """Medians over some steps of an engine: work of a layer, seconds of the draft and of everything."""
        engine = Engine(self.model, Plan(preset="probe", dtype=self.model.dtype, batch_size=rows, **plan))
        rng, length = np.random.default_rng(rows), self.lengths[0]
        prompts = rng.integers(self.config.vocab_size, size=(rows, length)).tolist()
        room = self.config.max_positions - length
        state, infos = engine.init(prompts, SamplingParams(max_new_tokens=min(64, room), ignore_eos=True)), []
        while not state.done and len(infos) < STEPS:
            state, info = engine.step(state)
            infos.append(info)
        infos = infos[2:] or infos

        def middle(value: Callable) -> float:
            return float(statistics.median(map(value, infos)))

        new = infos[0].drafted + 1
        context = middle(lambda info: info.context)
        work = {
            "rows": rows,
            "tokens": rows * new,
            "read": context,
            "scores": new * context,
            "blocks": middle(lambda info: info.verify.hits + info.verify.misses) / LAYERS,
            "misses": middle(lambda info: info.verify.fetched) / LAYERS,
        }
        whole = middle(lambda info: info.draft_s + info.verify_s + info.commit_s)
        return work, middle(lambda info: info.draft_s), whole

    @property
    def _weights(self):
        return self.model.weights.layers[0]

    def _cache(self, rows: int):
        kv = new_cache(self.config, rows, self.positions, self.model.dtype, self.resident.device)
        return kv._replace(k=kv.k[:1], v=kv.v[:1])

    def _inputs(self, rows: int, new: int, length: int):
        h = np.random.default_rng(0).standard_normal((rows, new, self.config.hidden_size), np.float32)
        h = jnp.asarray(h, self.model.weights.embed.dtype)
        return h, jnp.full(rows, length, jnp.int32), jnp.full(rows, new, jnp.int32)

    def _routed(self, rows: int, new: int, share: float):
        """Hidden states, the experts' inputs, a routing that uses about `share` of the experts, and how many it uses."""
        h, _, _ = self._inputs(rows, new, self.lengths[0])
        tokens, each = rows * new, self.config.experts_per_token
        used = max(each, min(round(share * self.config.num_experts), tokens * each))
        ids = (np.arange(tokens * each) % used).astype(np.int32).reshape(tokens, each)
        routing = Routing(ids=jnp.asarray(ids), weights=jnp.full(ids.shape, 1 / each, jnp.float32))
        return h, h.reshape(tokens, -1), routing, len(np.unique(ids))

    def _sample(self, call: Callable, rows: int, new: int, length: int = 0, *, chain: int = 1, **work: float) -> Sample:
        seconds, spread = timed(call)
        self.spreads.append(spread)
        tokens = rows * new
        work = {"rows": rows, "tokens": tokens, "read": rows * length, "scores": tokens * length, **work}
        return Sample(work | {"choices": tokens * self.config.experts_per_token}, seconds / chain)


def timed(call: Callable, *, budget_s: float = BUDGET_S, least: int = LEAST) -> tuple[float, float]:
    """Median seconds of a call that returns what to wait for, and half of their relative middle range."""
    jax.block_until_ready(call())
    seconds: list[float] = []
    while len(seconds) < least or sum(seconds) < budget_s:
        start_s = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start_s)
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / 2 / median


def _small(config: ModelConfig) -> ModelConfig:
    """Two layers like the first one with experts, with fewer of them where they are large; a vocabulary that fits."""
    layer = config.layers[config.moe_layers[0]]
    each = config.expert_params * 4
    experts = min(config.num_experts, max(config.experts_per_token, MOST_BYTES // each))
    if experts < config.num_experts:
        layer = dataclasses.replace(layer, router=dataclasses.replace(layer.router, num_experts=experts, groups=None))
    return dataclasses.replace(config, num_layers=LAYERS, num_experts=experts, layer_configs=(layer,) * LAYERS)


_accept = jax.jit(accept_greedy)
_finite = jax.jit(finite_positions)
_argmax = jax.jit(functools.partial(jnp.argmax, axis=-1))
