"""The target's own layers for further tokens as the draft: attention and experts, all or a few of them resident; chains, or trees
of one layer."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.models import mtp
from specmoe_jax.models.experts import block_bytes
from specmoe_jax.models.packing.dense import dense_itemsize
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves
from specmoe_jax.offload.stream_schedule import ACCELERATOR
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Cost, Load
from specmoe_jax.planner.drafts.checks import TREE_FIELDS
from specmoe_jax.planner.drafts.protocol import DraftCosts, DraftDescription
from specmoe_jax.planner.drafts.search_starts import LENGTHS, TREE_DEPTHS, Axis, SearchStart, tree
from specmoe_jax.planner.memory.memory_account import DraftMemory
from specmoe_jax.support.errors import PlanError


class MtpDraftDescription(DraftDescription):
    name = "mtp"
    several_devices = True
    given = "mtp_head"
    assumed_acceptance = 0.7  # of the first token 0.7 to 0.9, of the third 0.33 to 0.65 in published figures

    fields = TREE_FIELDS | {"draft_expert_dtype", "draft_experts"}

    def check(self, plan: Plan, config: ModelConfig) -> None:
        count = config.mtp_layers
        if count == 0:
            raise PlanError(
                "draft=mtp needs a model with a layer for further tokens, this one has 0 (num_nextn_predict_layers in "
                "config.json); take another draft"
            )
        super().check(plan, config)
        if count > 1 and plan.draft_tree_top_k is not None:
            raise PlanError(
                f"draft_tree_top_k is {plan.draft_tree_top_k}; trees are grown by one layer for further tokens, and this model has "
                f"{count}: leave out the draft_tree fields"
            )
        if count > 1 and (plan.draft_length or 0) > count:
            raise PlanError(
                f"draft_length is {plan.draft_length}; this model's {count} layers for further tokens draft one each: give at most "
                f"{count}"
            )
        layer = mtp.layer_config(config)
        for name in ("draft_expert_dtype", "draft_experts"):
            if getattr(plan, name) is not None and layer.experts is None:
                raise PlanError(f"{name} has no effect: the layers for further tokens have no experts; leave it out")
        hot = plan.draft_experts
        if hot is not None and (isinstance(hot, tuple) or not config.experts_per_token <= hot < config.num_experts):
            raise PlanError(
                f"draft_experts is {hot}; draft=mtp takes one number, {config.experts_per_token} to {config.num_experts - 1} of "
                "each layer's experts on the accelerator, or none for all"
            )

    def memory(self, plan: Plan, config: ModelConfig, *, head=None, model=None) -> DraftMemory:
        itemsize, count = DTYPE_BYTES[plan.dtype], config.mtp_layers
        return DraftMemory(
            fixed=mtp.head_bytes(config, plan.dtype, plan.draft_expert_dtype, hot=_hot(plan)),
            host=0 if _hot(plan) is None else mtp.experts_bytes(config, plan.dtype, plan.draft_expert_dtype),
            row=count * config.hidden_size * itemsize,
            position=count * costs.cache_row(mtp.layer_config(config).attention) * itemsize,
        )

    def costs(self, plan: Plan, config: ModelConfig, load: Load, *, skew: float, **_) -> DraftCosts:
        """Each layer reads the pass's committed tokens (padded to all of the pass's), then drafted ones; an output matrix a token.

        One layer reads each token that it drafts on its own, of a tree a level of draft_tree_top_k nodes at a time; of several the
        k-th reads the k tokens before its own at once.
        """
        itemsize, length, width = DTYPE_BYTES[plan.dtype], plan.draft_length or 1, plan.draft_tree_top_k or 1
        probabilities = routing.choice_probabilities(config.num_experts, config.experts_per_token, skew)
        size = sum(spec.size for spec in spec_leaves(mtp.weight_specs(config)))
        layer, output = mtp.layer_config(config, plan.draft_expert_dtype), dense_itemsize(plan.dtype, plan.dense_dtype)

        def one(of: Load, *, drawn: int = 1) -> tuple[Cost, ...]:
            found = [
                costs.projections(size, of, itemsize),
                costs.attention(layer.attention, of, itemsize, resource=ACCELERATOR, programs=0),
            ]
            if layer.experts is not None:
                held, used = block_bytes(layer.experts, plan.dtype), routing.distinct(probabilities, of.tokens)
                used = min(used, _hot(plan) or config.num_experts)
                found.append(costs.experts(config, of.tokens, used, itemsize, expert_bytes=held, programs=0))
            return (*found, *([costs.head(config, load.rows * drawn, output)] if drawn else []))

        if config.mtp_layers == 1:
            again = one(Load(load.rows, width, load.context + length / 2), drawn=width)
            return DraftCosts(costs=(*one(load), *(again * (length - 1))))
        committed = [cost for layer in range(config.mtp_layers) for cost in one(load, drawn=int(layer == 0))]
        drafted = [cost for new in range(1, length) for cost in one(Load(load.rows, new, load.context))]
        return DraftCosts(costs=(*committed, *drafted))

    def layers(self, config: ModelConfig) -> int:
        return 1

    def start(self, config: ModelConfig, flow: SearchStart, *, trees: bool = False) -> SearchStart | None:
        if config.mtp_layers == 0:
            return None
        if trees and config.mtp_layers > 1:
            return None
        lengths = LENGTHS if config.mtp_layers == 1 else tuple(range(1, config.mtp_layers + 1))
        choices = tuple(map(tree, TREE_DEPTHS)) if trees else lengths
        first = tree(TREE_DEPTHS[0]) if trees else {"draft_length": lengths[0]}
        return SearchStart(flow.plan.replace(draft=self.name, **first), (Axis("draft_length", choices), *flow.axes))


def _hot(plan: Plan) -> int | None:
    """Experts of each layer on the accelerator; None for all. A tuple is refused."""
    return None if isinstance(plan.draft_experts, tuple) else plan.draft_experts


DRAFT = MtpDraftDescription()
