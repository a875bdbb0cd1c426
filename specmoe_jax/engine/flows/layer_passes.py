"""What the passes of all flows share: the embedding, what a draft observes, and the draft's own pass."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.migration import prefetch
from specmoe_jax.engine.flows.protocol import Unfinished
from specmoe_jax.engine.rows import Split, gathered, split_of
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.speculate.drafts.protocol import TokenChoice
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.types import KVCache, Tree


@jax.jit
def as_arrays(*arrays):
    """Host arrays on the accelerator, by one call: jnp.asarray takes 70 us each, this 25 in all (JAX 0.10, two cores)."""
    return arrays


def features(runtime: Runtime, h: jax.Array, inputs: dict[int, jax.Array]) -> jax.Array | None:
    """What a FeatureDraft, or whoever reads, takes of a pass, all rows on every device. h [B, T, M] after the last layer.

    inputs: those of `runtime.feature_layers`.
    """
    if not runtime.gives_features:
        return None
    if not runtime.feature_layers:
        return stages.final_norm(runtime.config.head, runtime.weights.outer, gathered(h))
    watched = [gathered(inputs[layer])[..., : runtime.config.hidden_size] for layer in runtime.feature_layers]
    return jnp.concatenate(watched, axis=-1)


def embed(runtime: Runtime, tokens, lengths: jax.Array, tree: Tree | None = None, split: Split = None) -> jax.Array:
    """tokens [B, T] at positions lengths[b] + t, or + depth in a tree -> [B, T, M]."""
    return stages.embed(runtime.config.embedding, runtime.weights.outer, tokens, lengths, tree, split=split)


def finished(h: jax.Array | Unfinished) -> jax.Array:
    """[B, T, M] after a layer, whose experts may have to be computed yet."""
    return stages.experts(*h, split=split_of(h.h)) if isinstance(h, Unfinished) else h


def fetched(h: jax.Array) -> jax.Array:
    """On the accelerator, whether or not it waited in host memory."""
    return h if h.sharding.memory_kind == "device" else jax.device_put(h, jax.memory.Space.Device)


def on_all(h: jax.Array) -> jax.Array:
    """[B, T, M] of all rows on every device. What every device has already stays where it is, which may be host memory."""
    return h if split_of(h) is None else gathered(fetched(h))


class DraftForward:
    """What a draft calls to run the resident model. Holds, for one draft, the pool that prefetches change.

    The draft set itself does not change meanwhile: its slot tables are fixed when the draft starts, and
    prefetches go to free slots only.
    """

    def __init__(self, runtime: Runtime, memory: ExpertMemory, slots: list[DraftSlots], active: np.ndarray, length: int):
        self.memory, self.prefetched = memory, 0
        self.choices: list[np.ndarray] = []  # for each token that was fed, [L, B, A]
        self.predicted = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), np.int64)
        self._runtime, self._slots, self._num_new, self._length = runtime, slots, active.astype(np.int32), length
        self._calls, self._start_s = 0, time.perf_counter()

    def __call__(self, kv: KVCache, tokens, lengths) -> tuple[jax.Array, KVCache]:
        tokens, lengths = as_arrays(tokens, lengths)
        logits, kv, choices = self._runtime.cache_tier.draft_forward(
            self._runtime, tokens, kv, lengths, self._num_new, self.memory.pool, self._slots
        )
        self._calls += 1
        if self._runtime.plan.foresees:
            self._note(choices)
        if self._runtime.plan.prefetch == "draft":
            self._prefetch()
        return logits, kv

    @property
    def chain(self) -> Callable | None:
        """See DraftView.chain: None where something is prefetched on what the draft's gates chose."""
        return None if self._runtime.plan.prefetch == "draft" else self._chain

    def _chain(self, kv: KVCache, token, lengths, choice: TokenChoice, length: int):
        run = self._runtime.cache_tier.draft_chain
        *drafted, choices = run(self._runtime, token, kv, lengths, self._num_new, self.memory.pool, self._slots, choice, length)
        for chosen in () if choices is None else jax.device_get(choices):
            self._note(chosen)
        return tuple(drafted)

    def _note(self, choices) -> None:
        """Keeps what the routers chose for a token."""
        chosen = np.stack(jax.device_get(choices))
        self.choices.append(chosen)
        self.predicted += np.stack([count_choices(ids, self._runtime.config.num_experts) for ids in chosen])

    def _prefetch(self) -> None:
        """Prefetches as much as fits into the estimated rest of the drafting time."""
        elapsed_s = time.perf_counter() - self._start_s
        remaining_s = elapsed_s / self._calls * (self._length - self._calls)
        self.memory, copied = prefetch(self._runtime, self.memory, self.predicted, first_layer=0, budget_s=remaining_s)
        self.prefetched += copied
