"""Numbers only: what a plan needs and what it will cost, before a weight is read."""
