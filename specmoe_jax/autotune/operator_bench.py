"""Times the engine's compiled pieces alone and warm, a few shapes each (profile.py)."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine import stages
from specmoe_jax.engine.runtime import build, new_cache
from specmoe_jax.kv_cache.positions import KV_PAGE, pages_of
from specmoe_jax.models.model import Model
from specmoe_jax.ops import empty_cache
from specmoe_jax.planner.measured.operators import Sample
from specmoe_jax.planner.memory.account import account
from specmoe_jax.speculate.acceptance import accept_greedy, decided
from specmoe_jax.types import Routing

SHAPES = ((1, 1), (1, 5), (4, 3), (16, 1), (16, 5), (64, 1), (64, 5))  # rows B and positions T of a pass
ROWS = tuple(sorted({rows for rows, _ in SHAPES}))
CHAIN = 8  # programs issued one after the other before the host waits
BUDGET_S, LEAST = 0.03, 5  # of the repetitions of one shape, after one that compiles


class OperatorBench:
    """Runtimes of a resident, an on_demand and a streamed plan, and one method per operator."""

    def __init__(self, model: Model):
        self.model = model
        self.config = model.config
        self.layer = next(i for i in self.config.moe_layers if i not in self.config.recurrent_layers)  # stands for all
        self.layer_config = self.config.layers[self.layer]
        self.spreads: list[float] = []
        room = model.config.max_positions - max(new for _, new in SHAPES) - 1
        self.lengths = tuple(sorted({max(1, min(length, room)) for length in (48, 448)}))
        self.positions = self.lengths[-1] + max(new for _, new in SHAPES)
        self.resident = self._runtime(Plan(preset="probe", expert_flow="resident"))
        self.on_demand = self._runtime(Plan(preset="probe"))
        self.streams = self._runtime(Plan(preset="probe", expert_flow="stream", kv_tier="host"))
        self.pool = self.resident.flow.first_memory(self.resident).pool

    def _runtime(self, plan: Plan):
        rows, plan = max(ROWS), plan.replace(dtype=self.model.dtype)
        needed = account(self.config, plan.replace(batch_size=rows), batch_rows=rows, positions=self.positions)
        return build(self.model, plan, needed, None, progress=False)

    def attention(self, rows: int, new: int, length: int) -> Sample:
        kv, (h, lengths, num_new) = self._cache(rows), self._inputs(rows, new, length)

        def call():
            nonlocal kv
            _, _, _, routing, k, v = self.on_demand.cache_tier.attention(self.on_demand, self.layer, h, kv, lengths, num_new)
            kv = kv._replace(k=(*kv.k[:-1], k), v=(*kv.v[:-1], v))
            assert routing is not None
            return np.asarray(routing.ids)

        return self._sample(call, rows, new, length)

    def pre_attention(self, rows: int, new: int) -> Sample:
        h, lengths, _ = self._inputs(rows, new, self.lengths[0])
        return self._sample(lambda: stages.pre_attention(self.layer_config, self._weights, h, lengths), rows, new)

    def attend_paged(self, rows: int, new: int, length: int) -> Sample:
        h, lengths, num_new = self._inputs(rows, new, length)
        projected, each = stages.pre_attention(self.layer_config, self._weights, h, lengths), pages_of(self.positions)
        attends = self.layer_config.attention
        cache = empty_cache(rows * each, attends.num_kv_heads, KV_PAGE, attends.cache_dim, self.model.dtype)
        table = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
        host = jax.device_put((*projected, self._weights.sinks, cache, table, lengths, num_new), self.streams.context.host)
        *inputs, cache, table, lengths, num_new = host

        def call():
            nonlocal cache
            out, cache = stages.attend_paged(self.layer_config, *inputs, cache, table, lengths, num_new)
            return out

        return self._sample(call, rows, new, length)

    def post_attention(self, rows: int, new: int) -> Sample:
        h, lengths, num_new = self._inputs(rows, new, self.lengths[0])
        queries = stages.pre_attention(self.layer_config, self._weights, h, lengths)[0]
        attended = jnp.zeros((*queries.shape[:-1], self.layer_config.attention.head_dim), queries.dtype)  # they may have gates
        return self._sample(lambda: stages.post_attention(self.layer_config, self._weights, h, attended, num_new), rows, new)

    def experts(self, rows: int, new: int, share: float) -> Sample:
        h, x, routing, used = self._routed(rows, new, share)
        assert self.resident.experts.resident_slots is not None
        pool, slots = self.pool, self.resident.experts.resident_slots[0]
        return self._sample(lambda: stages.experts(self.layer_config, h, x, routing, pool, slots), rows, new, blocks=used)

    def head(self, rows: int, new: int) -> Sample:
        h, _, _ = self._inputs(rows, new, self.lengths[0])
        drafted = np.zeros((rows, new - 1), np.int32)

        def call():
            logits = stages.head(self.config.head, self.model.weights, h)
            return np.asarray(_decide(draft_tokens=drafted, target_logits=logits))

        return self._sample(call, rows, new)

    def draft_head(self, rows: int) -> Sample:
        token, lengths = np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32)

        def call():
            out = token
            for _ in range(CHAIN):
                h = stages.embed(self.config.embedding, self.model.weights, out, lengths)
                logits = stages.head(self.config.head, self.model.weights, h)
                out = _argmax(logits)
            return out

        return self._sample(call, rows, 1, chain=CHAIN)

    def stream(self) -> Sample:
        buffer = self.streams.experts.store.new_buffer()

        def call():
            nonlocal buffer
            buffer = self.streams.experts.store.stream(buffer, 0)
            return buffer

        return self._sample(call, 1, 1, blocks=self.config.num_experts)

    @property
    def _weights(self):
        return self.model.weights.layers[self.layer]

    def _cache(self, rows: int):
        on = self.resident.context.device
        kv = new_cache(self.config, rows, self.positions, self.model.dtype, on, replayed=0, states=on)
        before = (None,) * self.layer  # whose caches are not needed
        return kv._replace(k=(*before, kv.k[self.layer]), v=(*before, kv.v[self.layer]))

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


_decide = decided(accept_greedy)
_argmax = jax.jit(functools.partial(jnp.argmax, axis=-1))
