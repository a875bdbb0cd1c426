"""What families share of published checkpoints: reading config.json, naming tensors."""
