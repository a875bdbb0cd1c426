"""Loss, optimiser and one training step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.training import model, self_draft


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the demo model is trained. Lengths in tokens, counts in steps."""

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    optimizer: str  # adamw or muon
    weight_decay: float
    balance_weight: float
    capacity_factor: float
    common_experts: bool
    draft_rows: float  # fraction of a batch's rows that are routed as the self-draft would
    seed: int


class TrainState(NamedTuple):
    step: jax.Array
    params: model.Params
    opt_state: optax.OptState


class StepInfo(NamedTuple):
    """loss: nats per token of rows with native routing; draft_loss: of draft-routed rows; dropped: fraction."""

    loss: jax.Array
    draft_loss: jax.Array
    balance: jax.Array
    dropped: jax.Array


DRAFT_SIZES = (2, 4, 8)  # resident experts of the draft-routed rows, in turn


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, constant, linear to zero: the end may be moved until the decay begins."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, config.steps - config.decay_steps],
    )


def matrix_axes(params: Any) -> Any:
    """Which leaves of model.Params Muon orthogonalises, and over which axes; None leaves the others to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    layer = model.LayerParams._make(
        None if name in ("attention_norm", "expert_norm", "gate") else matrix for name in model.LayerParams._fields
    )
    return model.Params._make((layer,) * len(params.layers) if name == "layers" else None for name in model.Params._fields)


def freeze_common(updates: model.Params) -> model.Params:
    """The updates without those of the common experts."""

    def freeze(layer):
        return layer._replace(**{name: jnp.zeros_like(getattr(layer, name)) for name in ("base1", "base3", "base2")})

    return updates._replace(layers=tuple(map(freeze, updates.layers)))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    schedule = learning_rate(config)
    decay_mask = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.optimizer == "muon":
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrix_axes,
        )
    else:
        raise ValueError(f"optimizer is {config.optimizer!r}; it must be adamw or muon")
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def updated(
    optimizer: optax.GradientTransformation,
    gradients: Any,
    opt_state: optax.OptState,
    params: Any,
    *,
    change: Callable[[Any], Any] | None = None,
) -> tuple[Any, optax.OptState]:
    """Parameters and optimiser state after one update; optax's types know no trees of tuples. change: of the updates."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates if change is None else change(updates)), opt_state


def balance_loss(traces: list[model.LayerTrace]) -> jax.Array:
    """E * sum over experts of (share of choices) * (mean probability), mean over layers; 1 when even.

    Fedus et al. 2021, eq. 4, over the top-A choices.
    """

    def one(layer):
        num_experts = layer.probabilities.shape[-1]
        share = jnp.mean(jax.nn.one_hot(layer.ids, num_experts), axis=(0, 1))
        return num_experts * jnp.sum(share * jnp.mean(layer.probabilities, axis=0))

    return jnp.mean(jnp.stack([one(layer) for layer in traces]))


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target. [..., V], [...] int32 -> [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def residents_per_row(config: TrainConfig, num_experts: int) -> jax.Array:
    """[B] int32: the first rows draft with 2, 4, 8, 2, ... resident experts, the others keep all."""
    drafted = round(config.batch_size * config.draft_rows)
    sizes = [DRAFT_SIZES[i % len(DRAFT_SIZES)] for i in range(drafted)]
    return jnp.asarray(sizes + [num_experts] * (config.batch_size - drafted), jnp.int32)


def loss_fn(params: model.Params, batch: jax.Array, config: TrainConfig, model_config: ModelConfig):
    """batch [B, T + 1] int32 -> (loss, StepInfo)."""
    resident = residents_per_row(config, model_config.num_experts)
    native = (resident >= model_config.num_experts).astype(jnp.float32)
    substitute = functools.partial(self_draft.substitute_rows, num_resident=resident) if config.draft_rows else None
    logits, traces = model.forward(
        params, batch[:, :-1], model_config, capacity_factor=config.capacity_factor, substitute=substitute
    )
    rows = jnp.mean(token_losses(logits, batch[:, 1:]), axis=1)  # [B]
    balance = balance_loss(traces)
    choices = sum(layer.ids.size for layer in traces)
    info = StepInfo(
        loss=jnp.sum(rows * native) / jnp.sum(native),
        draft_loss=jnp.sum(rows * (1 - native)) / jnp.maximum(jnp.sum(1 - native), 1.0),
        balance=balance,
        dropped=functools.reduce(jnp.add, (layer.dropped for layer in traces)) / choices,
    )
    return jnp.mean(rows) + config.balance_weight * balance, info


def init_state(config: TrainConfig, model_config: ModelConfig) -> TrainState:
    params = model.init_params(jax.random.key(config.seed), model_config, common_experts=config.common_experts)
    return TrainState(step=jnp.int32(0), params=params, opt_state=make_optimizer(config).init(params))


@functools.partial(jax.jit, static_argnames=("config", "model_config"), donate_argnums=0)
def train_step(
    state: TrainState, batch: jax.Array, *, config: TrainConfig, model_config: ModelConfig
) -> tuple[TrainState, StepInfo]:
    """One update. batch [B, T + 1] int32; the old state's buffers are given up."""
    grads, info = jax.grad(loss_fn, has_aux=True)(state.params, batch, config, model_config)
    params, opt_state = updated(
        make_optimizer(config), grads, state.opt_state, state.params, change=None if config.common_experts else freeze_common
    )
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), info
