"""The self-draft (SpecMoE): the most used experts of each layer stay resident and stand in for the others while drafting."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.calibration import Acceptance
from specmoe_jax.planner.drafts.gated import GatedDraftDescription, mean_experts
from specmoe_jax.planner.routing import choice_probabilities
from specmoe_jax.support.errors import PlanError


class SelfDraftDescription(GatedDraftDescription):
    name = "self"
    fields = GatedDraftDescription.fields | {"draft_set", "substitution", "draft_top_k"}
    default_draft_set = "hot_temporal"
    several_devices = True
    # Less than what the papers report (0.913 on NLLB) and what the bundled model shows (0.8).
    assumed_acceptance = 0.6
    tried_unmeasured = True

    def check(self, plan: Plan, config: ModelConfig) -> None:
        super().check(plan, config)
        if plan.cached_experts is not None:
            raise PlanError(
                f"cached_experts={plan.cached_experts} has no effect with draft=self, which keeps its draft experts; leave it out"
            )

        if plan.draft_top_k is not None and plan.draft_top_k > config.experts_per_token:
            chosen = config.experts_per_token
            raise PlanError(f"draft_top_k is {plan.draft_top_k}; a token chooses {chosen} experts, and the draft may run fewer")

    def timed(self, num_experts: int) -> tuple[dict, ...]:
        some = -(-num_experts // 3)
        return ({"draft_length": 2, "draft_experts": some}, {"draft_length": 5, "draft_experts": some})

    def pinned_experts(self, plan: Plan) -> int | tuple[int, ...]:
        return plan.draft_experts or 0

    def smaller(self, config: ModelConfig) -> dict:
        return {"draft_experts": config.experts_per_token}

    def rate(self, found: Acceptance, plan: Plan, config: ModelConfig, skew: float) -> float:
        """With another N: each choice that has to be substituted costs the same factor.

        An assumption, exact at N = E (all accepted) and at the N that was measured.
        """
        if not found.experts:
            return found.rate
        probabilities = choice_probabilities(config.num_experts, config.experts_per_token, skew)
        absent, measured = _absent(probabilities, mean_experts(plan)), _absent(probabilities, found.experts)
        return max(found.rate, 1e-6) ** (absent / measured) if measured > 0 else found.rate


def _absent(probabilities: tuple[float, ...], experts: float) -> float:
    """Choices of a token that are not among the `experts` most popular ones."""
    return sum(probabilities[round(experts) :])


DRAFT = SelfDraftDescription()
