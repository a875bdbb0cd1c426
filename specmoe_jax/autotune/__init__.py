"""Measures machine, operators and acceptance, and chooses a plan. Above the engine."""
