"""The target's own layer for further tokens as the draft: one layer with attention and experts, all of them resident; chains."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models import mtp
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves
from specmoe_jax.offload.stream_schedule import ACCELERATOR
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.drafts.protocol import DraftCosts, DraftDescription
from specmoe_jax.planner.drafts.search_starts import SearchStart
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.support.errors import PlanError


class MtpDraftDescription(DraftDescription):
    name = "mtp"
    given = "mtp_head"
    assumed_acceptance = 0.7  # of the first token 0.7 to 0.9, of the third 0.33 to 0.65 in published figures

    def check(self, plan: Plan, config: ModelConfig) -> None:
        if config.mtp_layers != 1:
            raise PlanError(
                f"draft=mtp needs a model with one layer for further tokens, this one has {config.mtp_layers} "
                "(num_nextn_predict_layers in config.json); take another draft"
            )
        super().check(plan, config)

    def memory(self, plan: Plan, config: ModelConfig, *, head=None, model=None) -> DraftMemory:
        itemsize = DTYPE_BYTES[plan.dtype]
        return DraftMemory(
            fixed=mtp.head_bytes(config, plan.dtype),
            row=config.hidden_size * itemsize,
            position=costs.cache_row(mtp.layer_config(config).attention) * itemsize,
        )

    def costs(self, plan: Plan, config: ModelConfig, load: Load, *, skew: float, **_) -> DraftCosts:
        """The layer reads the pass's committed tokens (padded to all of the pass's), then its own; an output matrix each."""
        itemsize, length = DTYPE_BYTES[plan.dtype], plan.draft_length or 1
        one = Load(load.rows, 1, load.context + length / 2)
        probabilities = routing.choice_probabilities(config.num_experts, config.experts_per_token, skew)
        size = sum(spec.size for spec in spec_leaves(mtp.weight_specs(config)))

        def layer(of: Load) -> tuple[Cost, ...]:
            used = routing.distinct(probabilities, of.tokens)
            return (
                costs.projections(size, of, itemsize),
                costs.attention(mtp.layer_config(config).attention, of, itemsize, resource=ACCELERATOR, programs=0),
                costs.experts(config, of.tokens, used, itemsize, programs=0),
                costs.head(config, load.rows, itemsize),
            )

        return DraftCosts(costs=(*layer(load), *(layer(one) * (length - 1))))

    def layers(self, config: ModelConfig) -> int:
        return 1

    def start(self, config: ModelConfig, flow: SearchStart, *, trees: bool = False) -> SearchStart | None:
        return super().start(config, flow, trees=trees) if config.mtp_layers == 1 else None


DRAFT = MtpDraftDescription()
