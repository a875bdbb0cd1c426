"""Loss, optimiser and one training step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from specmoe_jax.training.updates import updated
from specmoe_jax.training.witness import cross_entropy, model
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig


class TrainState(NamedTuple):
    """ema: exponential moving average of the parameters, which is what is evaluated and exported."""

    step: jax.Array
    params: model.Params
    bias: jax.Array  # [L, E]
    opt_state: optax.OptState
    ema: model.Params


class StepInfo(NamedTuple):
    """loss, mtp_loss: nats per token; dropped: share of the choices; busiest: largest load of an expert over an even one."""

    loss: jax.Array
    mtp_loss: jax.Array
    dropped: jax.Array
    busiest: jax.Array


def learning_rate(recipe: RecipeConfig) -> optax.Schedule:
    """Warm-up, constant, then sqrt-shaped decay to zero (WSD; Haegele et al. 2024): the constant phase may go on at will."""
    end = recipe.stable_steps
    stable = optax.warmup_constant_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
    if not recipe.decay_steps:
        return stable
    decay = lambda step: recipe.learning_rate * (1 - jnp.sqrt(jnp.clip(step / recipe.decay_steps, 0.0, 1.0)))  # noqa: E731
    return optax.join_schedules([stable, decay], [end])


def matrix_axes(params: Any) -> Any:
    """Which leaves Muon orthogonalises, and over which axes: projections and experts. None leaves the others to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    names = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "projection"}
    return jax.tree_util.tree_map_with_path(lambda path, _: matrix if path[-1].name in names else None, params)


def make_optimizer(recipe: RecipeConfig) -> optax.GradientTransformation:
    schedule = learning_rate(recipe)
    if recipe.optimizer == "adamw":
        mask = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=mask)
    elif recipe.optimizer == "muon":
        update = optax.contrib.muon(
            schedule,
            weight_decay=recipe.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrix_axes,
        )
    else:
        raise ValueError(f"optimizer is {recipe.optimizer!r}; it must be adamw or muon")
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def mean_nats(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """hidden [B, T, M], targets [B, T] int32 -> mean cross entropy."""
    return cross_entropy.mean_nats(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))


def loss_fn(params: model.Params, bias: jax.Array, batch: jax.Array, config: WitnessConfig, recipe: RecipeConfig):
    """batch [B, T + 2] int32 -> loss, (loads [L, E], StepInfo). The MTP layer learns on the first rows, and its gradient
    goes into the trunk as well (DeepSeek-V3, eq. 25)."""
    factor = recipe.capacity_factor
    hidden, routings = model.hidden_states(params, bias, batch[:, :-2], config, factor)
    loss = mean_nats(hidden, params.head, batch[:, 1:-1])
    rows = max(1, round(recipe.mtp_share * batch.shape[0]))
    ahead, routing = model.mtp_states(params, bias, hidden[:rows], batch[:rows, 1:-1], config, factor)
    mtp_loss = mean_nats(ahead, params.head, batch[:rows, 2:])
    assert routing is not None  # the MTP layer has experts
    loads = jnp.stack([r.load for r in (*routings, routing)])
    even = jnp.mean(loads, axis=1, keepdims=True)
    dropped = sum(r.dropped for r in (*routings, routing)) / jnp.sum(loads)
    info = StepInfo(loss=loss, mtp_loss=mtp_loss, dropped=dropped, busiest=jnp.max(loads / even))
    return loss + recipe.mtp_weight * mtp_loss, (loads, info)


def balanced(bias: jax.Array, loads: jax.Array, rate: ArrayLike) -> jax.Array:
    """The bias of busy experts falls, that of idle ones rises, by `rate` (Wang et al. 2024, Alg. 1). bias, loads [L, E]."""
    return bias + rate * jnp.sign(jnp.mean(loads, axis=1, keepdims=True) - loads)


def _averaged(new: Any, average: Any, share: jax.Array) -> Any:
    """The average with `share` of what is new; optax's types know no trees of tuples."""
    return optax.incremental_update(new, average, share)


def init_state(config: WitnessConfig, recipe: RecipeConfig) -> TrainState:
    params = model.init_params(recipe.seed, config)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        bias=model.init_bias(config),
        opt_state=make_optimizer(recipe).init(params),
        ema=jax.tree.map(jnp.copy, params),
    )


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnums=0)
def train_step(state: TrainState, batch: jax.Array, *, config: WitnessConfig, recipe: RecipeConfig) -> tuple[TrainState, StepInfo]:
    """One update. batch [B, T + 2] int32; the old state's buffers are given up."""
    grads, (loads, info) = jax.grad(loss_fn, has_aux=True)(state.params, state.bias, batch, config, recipe)
    params, opt_state = updated(make_optimizer(recipe), grads, state.opt_state, state.params)
    # The bias is at full rate during the warm-up, where routing collapses otherwise, and comes to rest with the learning rate.
    share = jnp.where(state.step < recipe.warmup_steps, 1.0, learning_rate(recipe)(state.step) / recipe.learning_rate)
    rate = recipe.bias_rate * share
    # The average is short at first, or it would remember the random start.
    keep = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    new = TrainState(
        step=state.step + 1,
        params=params,
        bias=balanced(state.bias, loads, rate),
        opt_state=opt_state,
        ema=_averaged(params, state.ema, 1.0 - keep),
    )
    return new, info
