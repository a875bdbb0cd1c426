"""Loss, optimiser and one training step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from specmoe_jax.training.updates import updated
from specmoe_jax.training.witness import cross_entropy, model, repetition
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig


class TrainState(NamedTuple):
    """ema: exponential moving average of the parameters, which is what is evaluated and exported; continued: what the model said
    itself, [repeat_every * repeat_rows, S] int32, where it is trained against repetition."""

    step: jax.Array
    params: model.Params
    bias: jax.Array  # [L, E]
    opt_state: optax.OptState
    ema: model.Params
    continued: jax.Array | None


class Rates(NamedTuple):
    """Of one step; arguments, not constants, so that phases and peaks share one compiled step. bias: of the balancing bias."""

    learning: jax.Array
    bias: jax.Array


class StepInfo(NamedTuple):
    """loss, mtp_loss: nats per token; repeats: share of the tokens of the model's own continuations that complete a repeat, 0
    where none are made; local: nats of the lowest mixtures' choices given those of the token before; dropped: share of the
    choices; busiest: largest load of an expert over an even one."""

    loss: jax.Array
    mtp_loss: jax.Array
    repeats: jax.Array
    local: jax.Array
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


def rates(recipe: RecipeConfig, step: int) -> Rates:
    """The bias moves at full rate during the warm-up, where routing collapses otherwise, and comes to rest with the weights."""
    learning = jnp.float32(learning_rate(recipe)(step))
    share = 1.0 if step < recipe.warmup_steps else learning / recipe.learning_rate
    return Rates(learning=learning, bias=jnp.float32(recipe.bias_rate * share))


def matrix_axes(params: Any) -> Any:
    """Which leaves Muon orthogonalises, and over which axes: projections and experts. None leaves the others to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    names = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "projection"}
    return jax.tree_util.tree_map_with_path(lambda path, _: matrix if path[-1].name in names else None, params)


def make_optimizer(recipe: RecipeConfig, rate: float | jax.Array) -> optax.GradientTransformation:
    """rate: of this step; the optimiser's state does not depend on it."""
    if recipe.optimizer == "adamw":
        mask = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        update = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=mask)
    elif recipe.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
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


def locality_nats(routing: model.Routing, shape: tuple[int, ...]) -> jax.Array:
    """Mean -log of the share of a token's scores that lies on the experts of the token before, whose choice is given.

    shape: [B, T] of the routed tokens. The cross entropy by which StableMoE (Dai et al. 2022) ties a router to a given choice,
    with the neighbour's choice for the given one.
    """
    scores = routing.scores.reshape(*shape, -1)
    before = jnp.take_along_axis(scores[:, 1:], routing.ids.reshape(*shape, -1)[:, :-1], axis=-1)
    return -jnp.mean(jnp.log(jnp.sum(before, axis=-1) / jnp.sum(scores[:, 1:], axis=-1)))


def loss_fn(
    params: model.Params,
    bias: jax.Array,
    batch: jax.Array,
    continued: jax.Array | None,
    word_starts: jax.Array,
    config: WitnessConfig,
    recipe: RecipeConfig,
):
    """batch [B, T + 2] int32; continued: of `repetition.continuations`, or None; word_starts [V] bool
    -> loss, (loads [L, E], StepInfo).

    The MTP layer learns on the first rows, and its gradient goes into the trunk as well (DeepSeek-V3, eq. 25).
    """
    factor = recipe.capacity_factor
    hidden, routings = model.hidden_states(params, bias, batch[:, :-2], config, factor)
    loss = mean_nats(hidden, params.head, batch[:, 1:-1])
    rows = max(1, round(recipe.mtp_share * batch.shape[0]))
    ahead, routing = model.mtp_states(params, bias, hidden[:rows], batch[:rows, 1:-1], config, factor)
    mtp_loss = mean_nats(ahead, params.head, batch[:rows, 2:])
    assert routing is not None  # the MTP layer has experts
    local = jnp.mean(jnp.stack([locality_nats(r, hidden.shape[:2]) for r in routings[: recipe.local_layers]]))
    again, repeats = 0.0, jnp.float32(0)
    if continued is not None:
        again, repeats = repetition.loss_fn(params, bias, continued, word_starts, config, recipe)
    loads = jnp.stack([r.load for r in (*routings, routing)])
    even = jnp.mean(loads, axis=1, keepdims=True)
    dropped = sum(r.dropped for r in (*routings, routing)) / jnp.sum(loads)
    info = StepInfo(loss=loss, mtp_loss=mtp_loss, repeats=repeats, local=local, dropped=dropped, busiest=jnp.max(loads / even))
    total = loss + recipe.mtp_weight * mtp_loss + recipe.repeat_weight * again + recipe.local_weight * local
    return total, (loads, info)


def balanced(bias: jax.Array, loads: jax.Array, rate: ArrayLike) -> jax.Array:
    """The bias of busy experts falls, that of idle ones rises, by `rate` (Wang et al. 2024, Alg. 1). bias, loads [L, E]."""
    return bias + rate * jnp.sign(jnp.mean(loads, axis=1, keepdims=True) - loads)


def _averaged(new: Any, average: Any, share: jax.Array) -> Any:
    """The average with `share` of what is new; optax's types know no trees of tuples."""
    return optax.incremental_update(new, average, share)


def init_state(params: model.Params, bias: jax.Array, recipe: RecipeConfig) -> TrainState:
    """The state before the first step, with random weights or those of an exported checkpoint."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        bias=bias,
        opt_state=make_optimizer(recipe, 0.0).init(params),
        ema=jax.tree.map(jnp.copy, params),
        continued=jnp.zeros(continued_shape(recipe), jnp.int32) if recipe.repeat_weight else None,
    )


def continued_shape(recipe: RecipeConfig) -> tuple[int, int]:
    return recipe.repeat_every * recipe.repeat_rows, recipe.repeat_prompt + recipe.repeat_tokens


def with_continuations(state: TrainState, prompts: np.ndarray, config: WitnessConfig, recipe: RecipeConfig) -> TrainState:
    """What the weights of now say after training text, for the next `repeat_every` steps. prompts [n, repeat_prompt] int32."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    return state._replace(continued=repetition.continuations(state.params, state.bias, prompts, key, config, recipe))


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnums=0)
def train_step(
    state: TrainState, batch: jax.Array, step_rates: Rates, word_starts: jax.Array, *, config: WitnessConfig, recipe: RecipeConfig
) -> tuple[TrainState, StepInfo]:
    """One update. batch [B, T + 2] int32, word_starts [V] bool; the old state's buffers are given up."""
    continued = state.continued
    if continued is not None:
        continued = jax.lax.dynamic_slice_in_dim(
            continued, state.step % recipe.repeat_every * recipe.repeat_rows, recipe.repeat_rows
        )
    grads, (loads, info) = jax.grad(loss_fn, has_aux=True)(state.params, state.bias, batch, continued, word_starts, config, recipe)
    params, opt_state = updated(make_optimizer(recipe, step_rates.learning), grads, state.opt_state, state.params)
    # The average is short at first, or it would remember the random start.
    keep = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    new = TrainState(
        step=state.step + 1,
        params=params,
        bias=balanced(state.bias, loads, step_rates.bias),
        opt_state=opt_state,
        ema=_averaged(params, state.ema, 1.0 - keep),
        continued=state.continued,
    )
    return new, info
