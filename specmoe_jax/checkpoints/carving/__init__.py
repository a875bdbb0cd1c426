"""An MoE carved out of a dense checkpoint."""
