"""A model whose weights are quantised, and what that costs in its logits.

Never done unless asked for (Plan.expert_dtype, Plan.dense_dtype).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.plan_fields import DENSE_DTYPES
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.models.packing import pack, unpacked
from specmoe_jax.models.packing.dense import pack_dense
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.jax_settings import lenient


@lenient()
def quantise(model: Model, expert_dtype: str | None = None, dense_dtype: str | None = None) -> Model:
    """The model with every expert packed by a kind that a plan can ask for (models/packing), one expert at a time.

    dense_dtype: what the matrices of attention, shared experts, dense layers and output are packed as (models/packing/dense.py);
    embeddings, norms and routers stay as they are. Memory: what is packed, and one of model.experts, which may be on disk.
    Raises RequestError for another dense_dtype.
    """
    if dense_dtype not in (None, *DENSE_DTYPES):
        raise RequestError(f"dense_dtype is {dense_dtype!r}; it must be one of {', '.join(DENSE_DTYPES)}, or None")
    if dense_dtype is not None:
        model = dataclasses.replace(model, weights=pack_dense(model.weights, dense_dtype))
    if expert_dtype is None:
        return model
    config = model.config.with_packing(expert_dtype)
    layers = (model.experts[layer] for layer in range(config.num_expert_layers))
    experts = tuple(
        tuple(to_host(pack(config.experts, unpacked(stored, np.asarray(blocks[e])))) for e in range(config.num_experts))
        for stored, blocks in zip(model.config.layer_experts, layers, strict=True)
    )
    return dataclasses.replace(model, config=config, experts=experts)


@lenient()
def logit_error(exact: Model, other: Model, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far the distributions of `other` are from those of `exact` at every position of some prompts.

    kl: mean of KL(exact || other) in nats. top1: share of positions with the same most likely token. positions: how many.
    """
    divergence, agree, longest = [], [], max(map(len, prompts))  # one shape for all, so one compilation
    for tokens in prompts:
        token_ids = np.zeros((1, longest), np.int32)
        token_ids[0, : len(tokens)] = tokens
        p, q = (jax.nn.log_softmax(_logits(model, token_ids, len(tokens))[0, : len(tokens)]) for model in (exact, other))
        divergence.append(np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
        agree.append(np.asarray(p.argmax(-1) == q.argmax(-1)))
    return {
        "kl": float(np.concatenate(divergence).mean()),
        "top1": float(np.concatenate(agree).mean()),
        "positions": sum(map(len, agree)),
    }


def _logits(model: Model, token_ids: np.ndarray, length: int) -> jax.Array:
    """Of an encoder-decoder: the prompt as its source, and as what it translates to."""
    return model.logits(token_ids, *(() if model.config.encoder is None else (token_ids, np.array([length]))))
