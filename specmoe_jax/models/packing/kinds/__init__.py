"""One module a packing kind; registry.py lists them."""
