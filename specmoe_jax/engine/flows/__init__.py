"""Passes through the layers under each expert flow."""
