"""Trains an EAGLE-1 head for a frozen target (Li et al. 2024, 4.2): loss, one step, and the files in published names."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from specmoe_jax.models import layers
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.eagle.config import EagleWeights
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model, reference_attention
from specmoe_jax.models.spec import map_specs, random_tensor, spec_leaves
from specmoe_jax.ops import PackedMatrix
from specmoe_jax.support.errors import RequestError
from specmoe_jax.training.updates import updated


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """How a head is trained; the defaults of the weights, of noise and of clipping are the published recipe's.

    length: positions of a row. noise: features get uniform noise of (-noise, noise) / 2 * 512 / length.
    """

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    warmup_steps: int
    seed: int
    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.2
    clip: float = 0.5


class HeadState(NamedTuple):
    step: jax.Array
    weights: EagleWeights[jax.Array]
    opt_state: optax.OptState


class HeadInfo(NamedTuple):
    """feature_loss: smooth L1, mean over numbers. token_loss: nats. agreement: share of equal argmax tokens."""

    feature_loss: jax.Array
    token_loss: jax.Array
    agreement: jax.Array


def default_config(model: Model, *, intermediate_size: int | None = None, num_heads: int | None = None) -> dict:
    """config.json of a new head: the target's width and query heads, each with keys and values of its own, as published."""
    target = model.config
    return {
        "architectures": ["LlamaForCausalLMEagle"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": intermediate_size or 2 * target.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": num_heads or target.num_heads,
        "num_key_value_heads": num_heads or target.num_heads,
        "head_dim": target.hidden_size // (num_heads or target.num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bias": True,
        "vocab_size": target.vocab_size,
        "tie_word_embeddings": False,
    }


def init(raw: dict, training: HeadTraining, model: Model) -> tuple[EagleHead, HeadState]:
    """A new head in float32 and the state that trains it."""
    config = eagle_config.parse_config(raw, model.config, fused=False)
    weights = map_specs(lambda spec: jnp.asarray(random_tensor(spec, training.seed)), eagle_config.weight_specs(config))
    if weights.fc_bias is not None:
        weights = dataclasses.replace(weights, fc_bias=jnp.zeros_like(weights.fc_bias))
    state = HeadState(step=jnp.int32(0), weights=weights, opt_state=make_optimizer(training).init(weights))
    return eagle.attach(config, weights, model), state


def make_optimizer(training: HeadTraining) -> optax.GradientTransformation:
    """AdamW of the published recipe: values clipped, linear warm-up, linear to zero."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, training.learning_rate, training.warmup_steps),
            optax.linear_schedule(training.learning_rate, 0.0, max(1, training.steps - training.warmup_steps)),
        ],
        [training.warmup_steps],
    )
    return optax.chain(optax.clip(training.clip), optax.adamw(schedule, b1=0.9, b2=0.95))


def predict(head: EagleHead, following: jax.Array, features: jax.Array) -> jax.Array:
    """The network over whole rows, without a cache: following [B, T], features [B, T, M] -> predicted features [B, T, M]."""
    layer, weights = head.config.layer, head.weights.layer
    h, x = eagle.layer_input(head, following, features)
    positions = jnp.broadcast_to(jnp.arange(following.shape[1]), following.shape)
    q, k, v = layers.queries_keys_values(layer, weights, x, positions)
    attended = reference_attention(layer.attention, q, k, v)
    return layers.post_attention(layer, weights, h, attended, jnp.ones(following.shape, bool))[0]


def loss(head: EagleHead, following: jax.Array, features: jax.Array, noise: jax.Array, training: HeadTraining):
    """following [B, T]: the token after each position; features, noise [B, T, M] -> loss and HeadInfo.

    Every position but the last predicts the feature of the next: smooth L1 beside it, and the cross entropy between the
    tokens that the target's output matrix reads out of both.
    """
    predicted = predict(head, following[:, :-1], (features + noise)[:, :-1])
    wanted = features[:, 1:]
    scores, target_scores = eagle.logits(head, predicted), eagle.logits(head, wanted)
    feature_loss = jnp.mean(optax.huber_loss(predicted, wanted))
    token_loss = jnp.mean(optax.softmax_cross_entropy(scores, jax.nn.softmax(target_scores)))
    agreement = jnp.mean(jnp.argmax(scores, -1) == jnp.argmax(target_scores, -1))
    total = training.feature_weight * feature_loss + training.token_weight * token_loss
    return total, HeadInfo(feature_loss=feature_loss, token_loss=token_loss, agreement=agreement)


def make_step(head: EagleHead, training: HeadTraining):
    """(state, following [B, T], features [B, T, M]) -> (state, HeadInfo); the state is consumed, what the head borrows frozen.

    Raises RequestError for a target whose output matrix is packed.
    """
    if isinstance(head.output, PackedMatrix):
        raise RequestError(
            "the model's output matrix is packed, through which no gradient goes; train with the model as it is loaded"
        )
    optimizer = make_optimizer(training)

    def step(state: HeadState, frozen: EagleHead, following, features):
        key = jax.random.fold_in(jax.random.key(training.seed), state.step)
        noise = (jax.random.uniform(key, features.shape) - 0.5) * training.noise * 512 / training.length

        def objective(weights):
            return loss(dataclasses.replace(frozen, weights=weights), following, features, noise, training)

        gradients, info = jax.grad(objective, has_aux=True)(state.weights)
        weights, opt_state = updated(optimizer, gradients, state.opt_state, state.weights)
        return HeadState(step=state.step + 1, weights=weights, opt_state=opt_state), info

    compiled = jax.jit(step, donate_argnums=0)
    frozen = dataclasses.replace(head, embed=head.embed.astype(jnp.float32), output=head.output.astype(jnp.float32))
    return lambda state, following, features: compiled(state, dataclasses.replace(frozen, weights=None), following, features)


def write_head(folder: pathlib.Path, raw: dict, head: EagleHead, weights: EagleWeights[jax.Array]) -> None:
    """config.json and model.safetensors in float16, as published heads are stored, under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = spec_leaves(eagle_config.weight_specs(head.config))
    tensors = {s.name: np.asarray(w).astype(np.float16) for s, w in zip(specs, jax.tree.leaves(weights), strict=True)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}, indent=2) + "\n")
