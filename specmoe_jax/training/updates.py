"""One update of an optimiser."""

from typing import Any

import optax


def updated(
    optimizer: optax.GradientTransformation, gradients: Any, opt_state: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """Parameters and optimiser state after one update; optax's types know no trees of tuples."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
