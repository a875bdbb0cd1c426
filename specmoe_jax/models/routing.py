"""The router: which experts a token is sent to, and with which weights."""

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.ops.products import einsum
from specmoe_jax.types import Routing

TINY = 1e-20  # beside a sum of weights that could be 0: of a draft whose allowed experts have no weight at all


def route(
    config: RouterConfig,
    x: jax.Array,
    router: jax.Array,
    bias: jax.Array | None,
    valid: jax.Array,
    allowed: jax.Array | None = None,
    choice_bias: jax.Array | None = None,
) -> Routing:
    """Scores in float32, the best A experts of each token and their weights.

    x: [n, M]; router: [E, M]; bias, choice_bias: [E]; valid: [n] bool. Tokens that are not valid get the ids -1 and the
    weights 0, so that they neither fetch nor count for an expert. Ties go to the smaller id. allowed: [E] bool, the experts
    to choose among; where they are fewer than the top-k, the others chosen have weight 0.
    """
    logits = _logits(x.astype(jnp.float32), router)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    if config.rule == "softmax":
        weights, ids = jax.lax.top_k(_limit_groups(jax.nn.softmax(logits, axis=-1), config, 0.0), config.experts_per_token)
    elif config.choice_bias:
        assert choice_bias is not None
        weights, ids = _biased_choice(config, logits, choice_bias)
    else:  # chosen by logit, because sigmoids of large logits are all 1
        weights, ids = jax.lax.top_k(logits, config.experts_per_token)  # [n, A]
        weights = jax.nn.sigmoid(weights)
    if config.renormalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY)
    return Routing(
        ids=jnp.where(valid[:, None], ids, -1).astype(jnp.int32),
        weights=jnp.where(valid[:, None], weights * config.scaling, 0.0),
    )


def _logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x [n, M] float32 times router [E, M] -> [n, E], unrounded: an accelerator's dense product would round x."""

    def exact(x, router):
        return einsum("nm,em->ne", x, router.astype(jnp.float32))

    return jax.lax.platform_dependent(x, router, cpu=ops.dense_product, default=exact)


def _biased_choice(config: RouterConfig, logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen by sigmoid plus bias, weighted by the sigmoid alone (DeepSeek-V3, auxiliary-loss-free load balancing)."""
    scores = jax.nn.sigmoid(logits)
    biased = jnp.where(jnp.isneginf(logits), -jnp.inf, scores + bias.astype(jnp.float32))
    _, ids = jax.lax.top_k(_limit_groups(biased, config, -jnp.inf), config.experts_per_token)
    return jnp.take_along_axis(scores, ids, axis=1), ids


def _limit_groups(scores: jax.Array, config: RouterConfig, outside: float) -> jax.Array:
    """`outside` for all scores but those of the best groups: those with the largest sum of their `group_best` best scores.

    DeepSeek-V2 ranks by the single best (device-limited routing), V3 by two.
    """
    if config.groups is None:
        return scores
    groups, chosen = config.groups
    best, _ = jax.lax.top_k(scores.reshape(-1, groups, scores.shape[1] // groups), config.group_best)
    _, ids = jax.lax.top_k(best.sum(axis=-1), chosen)  # of [n, groups]
    kept = jax.nn.one_hot(ids, groups).sum(axis=1) > 0  # [n, groups]
    return jnp.where(jnp.repeat(kept, scores.shape[1] // groups, axis=1), scores, outside)
