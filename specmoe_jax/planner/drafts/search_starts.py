"""Where the planner's search starts, and the choices that it scans from there."""

from typing import NamedTuple

from specmoe_jax.config.plan import Plan

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10)
TREE_DEPTHS, TREE_TOP_K, TREE_NODES = (2, 3, 4, 6), 4, 2  # of drafted trees: depths, branches of a node, nodes kept a level
WORTH = 1.03  # the least gain of one more mechanism: predictions are no more exact than that


class Axis(NamedTuple):
    """One choice of the plan: a field and its values in order; one that changes several fields is a dict.

    least_gain: of tokens/s, by which another value has to be better; None: by what tells two predictions
    apart. whole: every value is tried, because those between may be worse than both ends; a scan ends
    otherwise after two in a row that do not help.
    """

    field: str
    values: tuple
    least_gain: float | None = None
    whole: bool = False


class SearchStart(NamedTuple):
    """A family of plans: its first plan, and the choices to scan in turn."""

    plan: Plan
    axes: tuple[Axis, ...]


def tree(depth: int) -> dict:
    """The fields of a plan that drafts a tree of this depth."""
    return {"draft_length": depth, "draft_tree_top_k": TREE_TOP_K, "draft_tree_tokens": TREE_NODES * depth}


def expert_counts(num_experts: int) -> tuple[int, ...]:
    """Experts of a layer that may stay resident: 1, 2, 3, 4, 6, 8, 12, ... below all of them."""
    return tuple(sorted({n for i in range(num_experts.bit_length()) for n in (1 << i, 3 << i >> 1) if 1 <= n < num_experts}))
