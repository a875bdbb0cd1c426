"""What the passes of all flows share: the embedding, what a draft observes, and the draft's own pass."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.migration import prefetch
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.types import KVCache, Tree


def features(runtime: Runtime, h: jax.Array, inputs: dict[int, jax.Array]) -> jax.Array | None:
    """What a FeatureDraft takes of a pass. h [B, T, M] after the last layer; inputs: those of `runtime.feature_layers`."""
    if not isinstance(runtime.draft, FeatureDraft):
        return None
    if not runtime.feature_layers:
        return stages.final_norm(runtime.config.norm_eps, runtime.weights, h)
    return jnp.concatenate([inputs[layer] for layer in runtime.feature_layers], axis=-1)


def embed(runtime: Runtime, tokens, lengths: jax.Array, tree: Tree | None = None) -> jax.Array:
    """tokens [B, T] at positions lengths[b] + t, or + depth in a tree -> [B, T, M]."""
    if runtime.config.embedding is None:
        return stages.embed(runtime.weights, tokens)
    depths = jnp.arange(tokens.shape[1]) if tree is None else tree.depths
    return stages.embed(runtime.weights, tokens, lengths[:, None] + depths, config=runtime.config.embedding)


def fetched(h: jax.Array) -> jax.Array:
    """On the accelerator, whether or not it waited in host memory."""
    return h if h.sharding.memory_kind == "device" else jax.device_put(h, jax.memory.Space.Device)


class DraftForward:
    """What a draft calls to run the resident model. Holds, for one draft, the pool that prefetches change.

    The draft set itself does not change meanwhile: its slot tables are fixed when the draft starts, and
    prefetches go to free slots only.
    """

    def __init__(self, runtime: Runtime, memory: ExpertMemory, slots: list[DraftSlots], active: np.ndarray, length: int):
        self.memory, self.prefetched = memory, 0
        self.predicted = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), np.int64)
        self._runtime, self._slots, self._active, self._length = runtime, slots, active, length
        self._calls, self._start_s = 0, time.perf_counter()

    def __call__(self, kv: KVCache, tokens, lengths) -> tuple[jax.Array, KVCache]:
        logits, kv, choices = _forward(self._runtime, self.memory.pool, self._slots, kv, tokens, lengths, self._active)
        self._calls += 1
        if self._runtime.plan.prefetch == "draft":
            self._prefetch(choices)
        return logits, kv

    def _prefetch(self, choices: list[jax.Array]) -> None:
        """Prefetches as much as fits into the estimated rest of the drafting time."""
        self.predicted += np.stack([count_choices(np.asarray(ids), self._runtime.config.num_experts) for ids in choices])
        elapsed_s = time.perf_counter() - self._start_s
        remaining_s = elapsed_s / self._calls * (self._length - self._calls)
        self.memory, copied = prefetch(self._runtime, self.memory, self.predicted, first_layer=0, budget_s=remaining_s)
        self.prefetched += copied


def _forward(runtime: Runtime, pool, slots, kv: KVCache, tokens, lengths, active) -> tuple[jax.Array, KVCache, list[jax.Array]]:
    """One token per row through resident experts only. tokens [B]; slots: per layer, how to substitute.

    -> logits [B, V], kv, and per layer with experts those [B, A] that the router chose, resident or not.
    """
    lengths, num_new = jnp.asarray(lengths), jnp.asarray(active, jnp.int32)
    h = embed(runtime, jnp.asarray(tokens)[:, None], lengths)
    keys, values, choices = [], [], []
    for layer, moe in enumerate(runtime.config.moe_index):
        of_layer = None if moe is None else slots[moe]
        h, ids, k, v = runtime.cache_tier.resident_layer(runtime, layer, h, kv, lengths, num_new, pool, of_layer)
        keys.append(k)
        values.append(v)
        choices += [] if ids is None else [ids]
    return stages.head(runtime.config.head, runtime.weights, h)[:, 0], kv._replace(k=tuple(keys), v=tuple(values)), choices
