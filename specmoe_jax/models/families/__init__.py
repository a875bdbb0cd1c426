"""One file per model family, their registry, and what they share: reading config.json, naming tensors."""
