"""Trains the bundled model (witness/) and EAGLE heads. Nothing at inference time imports this room."""
