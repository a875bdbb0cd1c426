"""Trains the bundled demo model: a small Mixtral. Nothing at inference time imports this room."""
