"""The only room that knows all others: prefill, step, generate."""

from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.scoring.score import Score

__all__ = ["Completion", "Engine", "Score", "TokenEvent"]
