"""What a step of a plan meets: rows, contexts, and how many different experts its tokens need and find. Pure."""

from typing import NamedTuple, TypeVar

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.routing import distinct

Count = TypeVar("Count", float, np.ndarray)


class Case(NamedTuple):
    """What a step meets. rows: that run. context: mean positions in their caches.

    probabilities: [E] descending, that a token chooses an expert, the mean over layers. slots: R of the memory account, and
    wanted_slots with which every dispatch fits at once; pinned_layers: of it too. row_share, run_share: how much of an
    independent token's choice one more row makes, and one more position of the same row.
    """

    rows: float
    context: float
    probabilities: tuple[float, ...]
    slots: int
    wanted_slots: int
    pinned_layers: int = 0
    row_share: float = 1.0
    run_share: float = 1.0

    def choosing(self, new: int) -> float:
        """Tokens of a pass of `new` positions, as many as if they chose independently."""
        return choosing(self.rows, new, self.row_share, self.run_share)


def choosing(rows: Count, new: Count, row_share: float, run_share: float) -> Count:
    """Tokens that choose independently and need as many different experts as `rows` rows of `new` positions."""
    return (1 + row_share * (rows - 1)) * (1 + run_share * (new - 1))


def kept_experts(config: ModelConfig, plan: Plan, case: Case) -> float:
    """Experts of a layer that a pass finds on the accelerator: pinned, and with `retain` what free slots still hold."""
    pinned = mean_pinned(plan)
    if not plan.retain:
        return min(pinned, config.num_experts)
    free = case.slots - pinned_slots(config, plan) - distinct(case.probabilities, case.choosing(plan.tokens_per_pass))
    return min(pinned + max(free, 0) / config.num_moe_layers, config.num_experts)


def mean_pinned(plan: Plan) -> float:
    """Experts of a layer that the plan keeps between passes."""
    value = plan.drafting.pinned_experts(plan)
    return sum(value) / len(value) if isinstance(value, tuple) else value


def pinned_slots(config: ModelConfig, plan: Plan) -> float:
    return mean_pinned(plan) * config.num_moe_layers


class MeasuredPass(NamedTuple):
    """Seconds of a pass. naive_s: of it and the drafting, by the maximum over the resources layer by layer. link_s: of the experts.

    misses: experts fetched.
    """

    verify_s: float
    naive_s: float
    link_s: float
    misses: float


def layer_work(rows: float, new: float, context: float) -> dict[str, float]:
    """What the operators of a layer are linear in, for `new` positions of each row."""
    return {"rows": rows, "tokens": rows * new, "read": rows * context, "scores": rows * new * context}
