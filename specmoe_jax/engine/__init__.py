"""The only room that knows all others: prefill, step, generate."""

from specmoe_jax.engine.generate import Completion, Engine, TokenEvent

__all__ = ["Completion", "Engine", "TokenEvent"]
