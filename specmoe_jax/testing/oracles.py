"""What the engine's results are compared with, written the plain way."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models.spec import down_of, fill_block, gate_of, up_of
from specmoe_jax.types import AcceptResult


def accepted_tokens(draft_tokens: jax.Array, result: AcceptResult) -> jax.Array:
    """What a step commits, [B, N+1] int32: the accepted run, then the target's token, then -1."""
    tokens = jnp.pad(draft_tokens.astype(jnp.int32), ((0, 0), (0, 1)), constant_values=-1)
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    run = result.num_accepted[:, None]
    return jnp.where(column < run, tokens, jnp.where(column == run, result.next_token[:, None], -1))


def expert_block(gate: np.ndarray, up: np.ndarray, down: np.ndarray, dtype: str) -> np.ndarray:
    """The block [3, F, M] of a plain SwiGLU expert from its matrices in checkpoint layout ([F, M], [F, M], [M, F])."""
    shape = (3, *gate.shape)
    return fill_block(((gate_of, gate), (up_of, up), (down_of, down)), shape, dtype)
