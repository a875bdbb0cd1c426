"""The router: which experts a token is sent to, and with which weights."""

import jax
import jax.numpy as jnp

from specmoe_jax.types import Routing


def route(
    x: jax.Array, router: jax.Array, experts_per_token: int, valid: jax.Array, allowed: jax.Array | None = None
) -> Routing:
    """Mixtral's rule: softmax over all experts in float32, top-k, renormalise.

    x: [n, M]; router: [E, M]; valid: [n] bool. Tokens that are not valid get the ids -1 and the weights 0, so
    that they neither fetch nor vote for an expert. Ties go to the smaller id. allowed: [E] bool, the experts to choose
    among; where they are fewer than the top-k, the others chosen have weight 0.
    """
    logits = jnp.einsum(
        "nm,em->ne", x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)  # [n, A]
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(
        ids=jnp.where(valid[:, None], ids, -1).astype(jnp.int32),
        weights=jnp.where(valid[:, None], weights, 0.0),
    )
