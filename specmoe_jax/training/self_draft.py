"""The self-draft as arithmetic on whole arrays: which resident expert stands in for which chosen one.

SpecMoE, Bang et al. 2026: the gate keeps its native choices and weights; a chosen expert that is not
resident is replaced by the resident one with the smallest L2 distance over all its matrices.
"""

import jax
import jax.numpy as jnp

from specmoe_jax.training.model import Experts


def expert_distances(experts: Experts) -> jax.Array:
    """L2 distance between every two experts over their three matrices -> [E, E] float32."""
    flat = jnp.concatenate([w.reshape(w.shape[0], -1) for w in experts], axis=1)
    # The mean leaves every distance unchanged and the difference of squares accurate.
    flat = flat - jnp.mean(flat, axis=0)
    squares = jnp.sum(flat * flat, axis=1)
    squared = squares[:, None] + squares[None, :] - 2 * flat @ flat.T
    distances = jnp.sqrt(jnp.maximum(squared, 0.0))
    return jnp.where(jnp.eye(len(squares), dtype=bool), 0.0, distances)


def hottest(counts: jax.Array, num_resident) -> jax.Array:
    """True for the `num_resident` largest counts; ties go to the smaller id. [..., E] -> [..., E] bool."""
    rank = jnp.argsort(jnp.argsort(-counts, axis=-1, stable=True), axis=-1)
    return rank < jnp.asarray(num_resident)[..., None]


def stand_ins(resident: jax.Array, distances: jax.Array) -> jax.Array:
    """The nearest resident expert of each expert, itself where resident. [..., E] bool, [E, E] -> [..., E] int32."""
    return jnp.argmin(jnp.where(resident[..., None, :], distances, jnp.inf), axis=-1)


def choice_counts(ids: jax.Array, num_experts: int) -> jax.Array:
    """How often each expert was chosen over the last two axes. [..., T, A] -> [..., E] int32."""
    return jnp.sum(jax.nn.one_hot(ids, num_experts, dtype=jnp.int32), axis=(-3, -2))


def substitute_rows(ids: jax.Array, experts: Experts, num_resident: jax.Array) -> jax.Array:
    """Draft routing within each row, its own hottest experts resident.

    ids [B, T, A]; num_resident [B] int32, E or more for a row that keeps its native experts -> [B, T, A].
    """
    num_experts = experts.w1.shape[0]
    resident = hottest(choice_counts(ids, num_experts), num_resident)  # [B, E]
    table = stand_ins(resident, jax.lax.stop_gradient(expert_distances(experts)))
    return jnp.take_along_axis(table[:, None, :], ids, axis=-1).astype(ids.dtype)
