"""What an indexer chose, on its way to later layers that attend the same positions (GLM-5.2).

It goes behind the hidden state of the token that asked, so it is wherever hidden states are: between the programs of a pass, in
pinned memory, in a micro-batch. Beside queries and attended values it is cut into as many parts as there are heads. A position is
three digits to the base 256, which bfloat16 holds exactly; one more than it, so that 0 is none.
"""

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import CHOICE_DIGITS, AttentionConfig
from specmoe_jax.models.basics import heads

BASE = 256


def apart(config: AttentionConfig, h: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states [B, T, M], and the choice behind them [B, T, taken_numbers] where the layer takes one."""
    if config.taken is None:
        return h, None
    return h[..., : -config.taken_numbers], h[..., -config.taken_numbers :]


def by_heads(config: AttentionConfig, numbers: jax.Array) -> jax.Array:
    """[B, T, n] -> [B, T, H, n / H], with zeros behind where that leaves a rest."""
    missing = -numbers.shape[-1] % config.num_heads
    return heads(jnp.pad(numbers, ((0, 0), (0, 0), (0, missing))), config.num_heads)


def told(config: AttentionConfig, attended: jax.Array, choice: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Attended values [B, T, H, D] and behind them the choice, where the next layer takes it; None: nothing had to be chosen."""
    if not config.told_numbers:
        return attended
    if choice is None:
        numbers = jnp.zeros((*attended.shape[:2], config.told_numbers), attended.dtype)
    else:
        numbers = written(*choice, config.told_numbers).astype(attended.dtype)
    return jnp.concatenate([attended, by_heads(config, numbers)], axis=-1)


def behind(config: AttentionConfig, h: jax.Array, attended: jax.Array, taken: jax.Array | None) -> jax.Array:
    """Hidden states [B, T, M] after the attention, and behind them the choice where the next layer takes it. taken: of `apart`."""
    if not config.hands_on:
        return h
    if taken is None:
        taken = attended[..., config.head_dim :].reshape(*h.shape[:2], -1)[..., : config.told_numbers]
    return jnp.concatenate([h, taken.astype(h.dtype)], axis=-1)


def written(places: jax.Array, there: jax.Array, numbers: int) -> jax.Array:
    """Positions [B, T, n] int32, and which of them there are, as so many numbers [B, T, numbers] int32."""
    number = jnp.where(there, places + 1, 0)
    digits = jnp.stack([number // BASE**i % BASE for i in range(CHOICE_DIGITS)], axis=-1).reshape(*places.shape[:2], -1)
    return jnp.pad(digits, ((0, 0), (0, 0), (0, numbers - digits.shape[-1])))


def read(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What was written: positions [B, T, n] int32, 0 for none, and which of them there are."""
    digits = numbers.astype(jnp.int32).reshape(*numbers.shape[:2], -1, CHOICE_DIGITS)
    number = (digits * jnp.array([BASE**i for i in range(CHOICE_DIGITS)])).sum(-1)
    return jnp.maximum(number - 1, 0), number > 0
