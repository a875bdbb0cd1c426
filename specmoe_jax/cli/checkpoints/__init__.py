"""The commands that write checkpoints."""
