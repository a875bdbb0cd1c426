"""A loaded model as a value, and its reference forward: no cache, no offloading, every expert at hand."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from specmoe_jax.config.layer_config import AttentionConfig, Embedding, ExpertConfig, Head, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import encoder, layers, recurrent
from specmoe_jax.models.attention import allowed, gate_of, gated, scores_and_values
from specmoe_jax.models.experts import block_bytes, block_function, mean
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.selection import handed, indexer
from specmoe_jax.models.spec import Weights, map_specs, random_block, random_tensor
from specmoe_jax.support.errors import PinnedMemoryError
from specmoe_jax.support.jax_settings import lenient
from specmoe_jax.types import CrossCache, Device, Routing


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose experts lie in host memory.

    weights: everything but the experts, arrays in the compute dtype.
    experts: `experts[i][e]` is one block of the i-th layer that has experts (the decoder's, then the encoder's), in
        pinned host memory; bfloat16 as uint16 bits. [3, F, M], or as ExpertConfig.block_shape says; packed ones are bytes.
    tokenizer: see checkpoints.tokenizer; None for a random model.
    dtype: "float32" or "bfloat16". synthetic: stamps for every figure made with it, see metrics.figures.
    path: of the checkpoint whose weights these are, unchanged but perhaps packed; None for every other model. adapter: of the
        directory of an adapter that is merged into them.
    """

    config: ModelConfig
    weights: Weights[jax.Array]
    experts: Sequence[Sequence[jax.Array]]
    tokenizer: Any
    dtype: str
    synthetic: tuple[str, ...] = ()
    path: pathlib.Path | None = None
    adapter: pathlib.Path | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as it crosses the link; the mean where layers are packed differently."""
        return mean([block_bytes(experts, self.dtype) for experts in self.config.layer_experts])

    def logits(self, token_ids: ArrayLike, source: ArrayLike | None = None, source_lengths: ArrayLike | None = None) -> jax.Array:
        """The reference: [B, T] int -> [B, T, V] float32, every expert computed for every token.

        source: [B, S] int, what the encoder reads where there is one; source_lengths: [B], of which so many count (None: all).
        """
        token_ids = jnp.asarray(token_ids, jnp.int32)
        cross = (None,) * self.config.num_layers if source is None else self._encoded(source, source_lengths)
        h = self._embedded(token_ids)
        for i, (config, weights) in enumerate(zip(self.config.layers, self.weights.layers, strict=True)):
            h = _reference_layer(config, weights, self._blocks(i), h, cross[i])
        return _reference_head(self.config.head, self.weights, h)

    def _encoded(self, source, lengths) -> tuple[CrossCache, ...]:
        """What each decoder layer attends of the sources."""
        source = jnp.asarray(source, jnp.int32)
        lengths = jnp.full(source.shape[0], source.shape[1]) if lengths is None else jnp.asarray(lengths)
        h = self._embedded(source)
        assert self.config.encoder is not None and self.weights.encoder is not None
        for i, (config, weights) in enumerate(zip(self.config.encoder.layers, self.weights.encoder.layers, strict=True)):
            h = _reference_encoder_layer(config, weights, self._blocks(self.config.num_layers + i), h, lengths)
        return encoder.cross_caches(self.config, self.weights, h, lengths)

    def _embedded(self, token_ids: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, M], placed as the experts are: layers alike are then one program, whatever stands before them."""
        return jax.device_put(_reference_embedding(self.config.embedding, self.weights, token_ids), jax.memory.Space.Device)

    def _blocks(self, layer: int) -> Iterator[jax.Array]:
        """All experts of one of all layers, each brought to the accelerator when it is asked for."""
        where = self.config.expert_layers
        blocks = self.experts[where.index(layer)] if layer in where else []
        return (jax.device_put(block, jax.memory.Space.Device) for block in blocks)


@functools.partial(jax.jit, static_argnums=0)
def _reference_embedding(config: Embedding | None, weights, token_ids: jax.Array) -> jax.Array:
    return layers.embed(weights, token_ids, _positions(token_ids), config)


@functools.partial(jax.jit, static_argnums=0)
def _reference_head(config: Head, weights, h: jax.Array) -> jax.Array:
    return layers.head(config, weights, h)


def _reference_layer(
    config: LayerConfig, weights, blocks: Iterable[jax.Array], h: jax.Array, cross: CrossCache | None
) -> jax.Array:
    """One decoder layer over whole sequences h [B, T, M]; quadratic in T and linear in E by intent."""
    return _all_experts(config, blocks, *_reference_attention(config, weights, h, cross))


@functools.partial(jax.jit, static_argnums=0)
def _reference_attention(config: LayerConfig, weights, h: jax.Array, cross: CrossCache | None):
    q, k, v = layers.pre_attention(config, weights, h, _positions(h))
    if config.attention.recurrent is None:
        attended = reference_attention(config.attention, q, k, v, weights.sinks)
    else:
        attended = recurrent.reference(config.attention.recurrent, weights.recurrent, q, k, v)
    return layers.post_attention(config, weights, h, attended, jnp.ones(h.shape[:2], bool), cross)


def _reference_encoder_layer(
    config: LayerConfig, weights, blocks: Iterable[jax.Array], h: jax.Array, lengths: jax.Array
) -> jax.Array:
    return _all_experts(config, blocks, *_reference_encoder_attention(config, weights, h, lengths))


@functools.partial(jax.jit, static_argnums=0)
def _reference_encoder_attention(config: LayerConfig, weights, h: jax.Array, lengths: jax.Array):
    return encoder.attention(config, weights, h, lengths)


def _positions(x: jax.Array) -> jax.Array:
    """[B, T] of x [B, T, ...]."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def _all_experts(
    config: LayerConfig, blocks: Iterable[jax.Array], h: jax.Array, x: jax.Array, routing: Routing | None
) -> jax.Array:
    """h with the chosen ones of all experts' outputs added; one program for every expert."""
    if routing is None:
        return h
    return _with_chosen(h, [_reference_expert(config.own_experts, x, block) for block in blocks], routing)


@functools.partial(jax.jit, static_argnums=0)
def _reference_expert(config: ExpertConfig, x: jax.Array, block: jax.Array) -> jax.Array:
    return block_function(config)(x, block)


@jax.jit
def _with_chosen(h: jax.Array, outputs: list[jax.Array], routing: Routing) -> jax.Array:
    chosen = jnp.take_along_axis(jnp.stack(outputs, axis=1), routing.ids[..., None], axis=1)  # of [n, E, M] -> [n, A, M]
    return layers.combine(h, chosen, routing)


def reference_attention(config: AttentionConfig, q, k, v, sinks: jax.Array | None = None) -> jax.Array:
    """Causal attention, scores in full. q [B, T, H, D], or with gates; k, v [B, T, K, D] -> as attention.attend."""
    q, asked = indexer.asked_of(config, q)
    q, gate = gate_of(config, q)
    positions = jnp.arange(q.shape[1])
    seen, choice = allowed(config, positions, positions)[None], None
    if asked is not None:
        choice = indexer.chosen(config, asked, v[:, :, 0], seen)
        seen = indexer.mask(*choice, q.shape[1])
    out = gated(scores_and_values(config, q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, sinks), gate)
    return handed.told(config, out, choice)


@lenient()
def random_model(config: ModelConfig, *, seed: int = 0, dtype: str = "float32", tokenizer: Any = None) -> Model:
    """A model of the given sizes with random weights, for tests and for speed where text does not matter."""
    family = family_of(config)

    def blocks(layer: int) -> tuple[jax.Array, ...]:
        layouts = (family.expert_layouts(config, layer, expert)[0] for expert in range(config.num_experts))
        return tuple(to_host(random_block(layout, config.experts.block_shape, seed, dtype)) for layout in layouts)

    return Model(
        config=config,
        weights=map_specs(lambda spec: jnp.asarray(random_tensor(spec, seed), spec.in_dtype(dtype)), family.weight_specs(config)),
        experts=tuple(blocks(layer) for layer in config.expert_layers),
        tokenizer=tokenizer,
        dtype=dtype,
    )


PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The environment variable that ends XLA's pool of pinned host memory on a GPU; 64 where it is not set."""


def _pool_limit() -> str:
    if jax.local_devices()[0].platform == "cpu":
        return ""
    return f", or set {PINNED_LIMIT} (now {os.environ.get(PINNED_LIMIT, '64')}) before JAX starts"


def to_host(block, device: Device | None = None) -> jax.Array:
    """A block in pinned host memory, where an accelerator (None: the first) can copy from it at full link speed.

    Blocks until done: device_put copies an unaligned numpy array asynchronously, and callers reuse theirs. Raises
    PinnedMemoryError where the system refuses the memory.
    """
    sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0], memory_kind="pinned_host")
    try:
        return jax.block_until_ready(jax.device_put(block, sharding))
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
            raise PinnedMemoryError(
                f"the system refused {block.nbytes} bytes of pinned host memory; leave experts on disk with a smaller cache: "
                f"expert_tier=disk and host_memory_bytes{_pool_limit()}"
            ) from e
        raise
