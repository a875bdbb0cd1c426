"""Adapters that are merged into a model when it is loaded."""
