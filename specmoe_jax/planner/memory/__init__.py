"""The memory account of a plan, budgets, and what fits."""
