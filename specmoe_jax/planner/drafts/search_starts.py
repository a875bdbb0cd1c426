"""Where the planner's search starts, and the choices that it scans from there."""

from typing import NamedTuple

from specmoe_jax.config.plan import Plan

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10)
TREE_DEPTHS, TREE_TOP_K, TREE_NODES = (2, 3, 4, 6), 4, 2  # of drafted trees: depths, branches of a node, nodes kept a level


class SearchStart(NamedTuple):
    """A family of plans: its first plan, and the choices to scan in turn, each as (field, values in order).

    A value that changes several fields at once is a dict.
    """

    plan: Plan
    axes: tuple[tuple[str, tuple], ...]


def tree(depth: int) -> dict:
    """The fields of a plan that drafts a tree of this depth."""
    return {"draft_length": depth, "draft_tree_top_k": TREE_TOP_K, "draft_tree_tokens": TREE_NODES * depth}


def expert_counts(num_experts: int) -> tuple[int, ...]:
    """Experts of a layer that may stay resident: 1, 2, 3, 4, 6, 8, 12, ... below all of them."""
    return tuple(sorted({n for i in range(num_experts.bit_length()) for n in (1 << i, 3 << i >> 1) if 1 <= n < num_experts}))
