"""The workload: what is to be generated, as far as its cost depends on it. Pure."""

import dataclasses
import itertools
import math
import statistics

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.planner.routing import assumed_skew
from specmoe_jax.support.errors import PlanError

# Accepted drafted tokens by draft length k, EAGLE on Mixtral-8x7B (SpecMoEOff; k counts the nodes of a small tree there).
EAGLE_MIXTRAL = (
    (2, 0.58),
    (3, 0.78),
    (4, 0.91),
    (5, 1.15),
    (6, 1.24),
    (8, 1.45),
    (10, 1.50),
    (15, 1.60),
    (20, 1.64),
    (30, 1.87),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """prompt_tokens, new_tokens: of a request, means.

    acceptance: the probability that a drafted token is accepted if those before it were, or pairs (draft length, mean accepted
    tokens), interpolated. skew: Gini coefficient of the expert counts, None for the one that planner.routing assumes.
    head: of draft=eagle, None for the usual one. draft_model: of draft=model. source_tokens: what an encoder reads. unlike:
    relative deviation between rows of the steps that they need, because the draft guesses some texts better than others.
    Raises PlanError for invalid values.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    acceptance: float | tuple[tuple[int, float], ...] = 0.7
    skew: float | None = None
    head: EagleConfig | None = None
    draft_model: ModelConfig | None = None
    source_tokens: int = 0
    unlike: float = 0.0

    def __post_init__(self):
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise PlanError(f"a workload of {self.prompt_tokens} prompt and {self.new_tokens} new tokens; both must be at least 1")
        if isinstance(self.acceptance, tuple):
            lengths = [length for length, _ in self.acceptance]
            if not lengths or lengths != sorted(set(lengths)) or any(not 0 <= mean <= k for k, mean in self.acceptance):
                raise PlanError(f"acceptance is {self.acceptance}; a map has ascending draft lengths k, each with a mean of 0 to k")
        elif not 0 <= self.acceptance <= 1:
            raise PlanError(f"acceptance is {self.acceptance}; it must be a probability, or pairs (draft length, mean accepted)")

    @property
    def context(self) -> float:
        """Mean cached positions of a sequence over its generation."""
        return self.prompt_tokens + self.new_tokens / 2

    def skew_of(self, config: ModelConfig) -> float:
        """The skew given, or the one assumed of the model's router."""
        return assumed_skew(config.num_experts, config.experts_per_token) if self.skew is None else self.skew

    def tokens_per_step(self, draft_length: int) -> float:
        """One from the target and the accepted ones, at most the requested number."""
        return min(1 + self.accepted(draft_length), self.new_tokens)

    def tokens_of(self, plan: Plan) -> float:
        """Of a step of a plan. A map counts the nodes of a tree; a probability its depth, which is less than a tree gives."""
        nodes = plan.draft_tree_tokens if isinstance(self.acceptance, tuple) else None
        return self.tokens_per_step(nodes or plan.draft_length or 0)

    def slowest_row_factor(self, plan: Plan, rows: float) -> float:
        """Steps until the last of `rows` rows that begin together has its tokens, over those of a mean row.

        What a row gets of a step is taken to be independent of the step before, its sum as normal, and rows to differ by `unlike`.
        """
        length, mean = plan.draft_length or 0, self.tokens_of(plan)
        if not length or mean <= 1:
            return 1.0
        rate = acceptance_rate(mean - 1, length) if isinstance(self.acceptance, tuple) else self.acceptance
        deviation = math.hypot(chance_deviation(rate, length, self.new_tokens), self.unlike)
        return max(1 + deviation * statistics.NormalDist().inv_cdf(0.5 ** (1 / max(rows, 1))), 1.0)

    def accepted(self, draft_length: int) -> float:
        """Mean accepted tokens of so many drafted."""
        if not isinstance(self.acceptance, tuple):
            return math.fsum(self.acceptance**j for j in range(1, draft_length + 1))
        points = ((0, 0.0), *self.acceptance) if self.acceptance[0][0] > 0 else self.acceptance
        for (low, below), (high, above) in itertools.pairwise(points):
            if low <= draft_length <= high:
                return below + (above - below) * (draft_length - low) / (high - low)
        return points[-1][1]


def chance_deviation(rate: float, length: int, tokens: float) -> float:
    """Relative deviation of the steps that so many tokens take, by chance alone."""
    chances = [rate**j * (1 - rate) for j in range(length)] + [rate**length]
    mean = sum(chance * (1 + j) for j, chance in enumerate(chances))
    variance = sum(chance * (1 + j - mean) ** 2 for j, chance in enumerate(chances))
    return math.sqrt(variance / (tokens * mean))


def acceptance_rate(accepted: float, length: int) -> float:
    """The conditional acceptance that gives so many accepted tokens of `length` (Leviathan et al. 2023, Eq. 1, solved)."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(1, length + 1)) < accepted else (low, middle)
    return low
