"""Predictions by linear models of the engine's own measured operators."""
