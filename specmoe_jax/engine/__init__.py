"""The only room that knows all others: prefill, step, generate."""

from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import Completion, TokenEvent

__all__ = ["Completion", "Engine", "TokenEvent"]
