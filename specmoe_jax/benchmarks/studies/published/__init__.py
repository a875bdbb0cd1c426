"""Checkpoints in published forms at real proportions: making them, and walking the whole road with them."""
