"""A loaded model as a value, and its reference forward: no cache, no offloading, every expert at hand."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from specmoe_jax.config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.families import family_of
from specmoe_jax.models.spec import (
    DTYPE_BYTES,
    Weights,
    expert_block,
    map_specs,
    random_tensor,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose experts lie in host memory.

    weights: everything but the experts, arrays in the compute dtype.
    experts: experts[layer][expert] is one block [3, F, M] in pinned host memory; bfloat16 as uint16 bits.
    tokenizer: see checkpoints.tokenizer; None for a random model.
    dtype: "float32" or "bfloat16". synthetic: stamps for every figure made with it, see metrics.figures.
    path: of the checkpoint whose weights these are, unchanged; None for every other model.
    """

    config: ModelConfig
    weights: Weights
    experts: tuple[tuple[jax.Array, ...], ...]
    tokenizer: Any
    dtype: str
    synthetic: tuple[str, ...] = ()
    path: pathlib.Path | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as it crosses the link."""
        return self.config.expert_params * DTYPE_BYTES[self.dtype]

    def logits(self, token_ids: jax.Array) -> jax.Array:
        """The reference: [B, T] int -> [B, T, V] float32, every expert computed for every token."""
        token_ids = jnp.asarray(token_ids, jnp.int32)
        h = layers.embed(self.weights, token_ids)
        for weights, blocks in zip(self.weights.layers, self.experts, strict=True):
            blocks = [jax.device_put(block, jax.memory.Space.Device) for block in blocks]
            h = _reference_layer(self.config, weights, blocks, h)
        return layers.head(self.config, self.weights, h)


@functools.partial(jax.jit, static_argnums=0)
def _reference_layer(config: ModelConfig, weights, blocks, h: jax.Array) -> jax.Array:
    """One decoder layer over whole sequences h [B, T, M]; quadratic in T and linear in E by intent."""
    batch, length, _ = h.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    q, k, v = layers.pre_attention(config, weights, h, positions)
    attended = reference_attention(q, k, v, config.sliding_window)
    h, x, routing = layers.post_attention(config, weights, h, attended, jnp.ones((batch, length), bool))
    outputs = jnp.stack([reference_expert(x, block) for block in blocks], axis=1)  # [n, E, M]
    chosen = jnp.take_along_axis(outputs, routing.ids[..., None], axis=1)  # [n, A, M]
    return layers.combine(h, chosen, routing)


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Causal attention, scores in full. q [B, T, H, D]; k, v [B, T, K, D] -> [B, T, H, D]."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a.astype(jnp.float32), group, axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k, precision="highest") / math.sqrt(q.shape[-1])
    row, column = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None]
    allowed = (column <= row) if window is None else (column <= row) & (column > row - window)
    p = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p, v, precision="highest").astype(q.dtype)


def reference_expert(x: jax.Array, block: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer 2020) of x [n, M] with a block [3, F, M] (bfloat16 as uint16 bits) -> [n, M] float32."""
    if block.dtype == jnp.uint16:
        block = jax.lax.bitcast_convert_type(block, jnp.bfloat16)
    gate, up, down = block.astype(jnp.float32)
    x = x.astype(jnp.float32)
    hidden = jax.nn.silu(jnp.dot(x, gate.T, precision="highest")) * jnp.dot(x, up.T, precision="highest")
    return jnp.dot(hidden, down, precision="highest")


def random_model(config: ModelConfig, *, seed: int = 0, dtype: str = "float32", tokenizer: Any = None) -> Model:
    """A model of the given sizes with random weights, for tests and for speed where text does not matter."""
    family = family_of(config)

    def blocks(layer: int) -> tuple[jax.Array, ...]:
        specs = (family.expert_specs(config, layer, expert) for expert in range(config.num_experts))
        return tuple(to_host(expert_block(*(random_tensor(spec, seed) for spec in expert), dtype)) for expert in specs)

    return Model(
        config=config,
        weights=map_specs(lambda spec: jnp.asarray(random_tensor(spec, seed), dtype), family.weight_specs(config)),
        experts=tuple(blocks(layer) for layer in range(config.num_layers)),
        tokenizer=tokenizer,
        dtype=dtype,
    )


def to_host(block) -> jax.Array:
    """A block in pinned host memory, where the accelerator can copy from it at full link speed.

    Blocks until done: device_put copies an unaligned numpy array asynchronously, and callers reuse theirs.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.block_until_ready(jax.device_put(block, sharding))
