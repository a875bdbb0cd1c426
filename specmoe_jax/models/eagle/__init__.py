"""EAGLE draft heads: configuration and network."""
