"""The only room that knows all others: prefill, step, generate."""

from specmoe_jax.engine.completion import Completion, TokenEvent
from specmoe_jax.engine.generate import Engine

__all__ = ["Completion", "Engine", "TokenEvent"]
