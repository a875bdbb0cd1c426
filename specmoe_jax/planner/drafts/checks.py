"""Checks that several drafts share. Each raises PlanError naming the field, its value and what would work."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import MAX_TREE, fields_of_a_plan
from specmoe_jax.support.errors import PlanError

# Fields of a plan that some drafts use and others do not; the table of a plan's fields has them all.
CHAIN_FIELDS = frozenset({"draft_length", "guard", "synthetic_acceptance"})
TREE_FIELDS = CHAIN_FIELDS | {"draft_tree_top_k", "draft_tree_tokens"}
GATED_FIELDS = CHAIN_FIELDS | {"draft_experts", "draft_stop"}
SOME_DRAFTS_USE = tuple(name for name, spec in fields_of_a_plan().items() if spec.info.by_draft)


def check_length(plan: Plan, fields: frozenset[str]) -> None:
    """fields: of SOME_DRAFTS_USE, those that the plan's draft uses."""
    if "draft_length" in fields and plan.draft_length is None:
        raise PlanError(f"draft={plan.draft} needs a draft_length, for example 4")


def check_tree(plan: Plan, config: ModelConfig, fields: frozenset[str]) -> None:
    """Sizes that the attention kernel takes (a tree mask of 64) and that the tree can have."""
    top_k, tokens, depth = plan.draft_tree_top_k, plan.draft_tree_tokens, plan.draft_length
    if (top_k is None) != (tokens is None):
        raise PlanError(f"draft_tree_top_k is {top_k} and draft_tree_tokens is {tokens}; give both, or none for a chain")
    if "draft_tree_tokens" not in fields or top_k is None or tokens is None or depth is None:
        return
    largest = min(top_k + (depth - 1) * top_k**2, MAX_TREE - 1)
    if plan.tree_rows > MAX_TREE or top_k > config.vocab_size:
        raise PlanError(
            f"draft_tree_top_k is {top_k}; with draft_length={depth} at most "
            f"{min(MAX_TREE // max(depth - 1, 1), config.vocab_size)} branches can be grown"
        )
    if not depth <= tokens <= largest:
        raise PlanError(
            f"draft_tree_tokens is {tokens}; a tree of depth draft_length={depth} with {top_k} branches has "
            f"{depth} to {largest} nodes to verify"
        )
    if plan.guard:
        raise PlanError("guard=True adapts the length of a chain, not a tree; leave out guard or the draft_tree fields")
    if plan.synthetic_acceptance is not None:
        raise PlanError("synthetic_acceptance is for chains; leave it out or the draft_tree fields")


def check_fields(plan: Plan, fields: frozenset[str]) -> None:
    """Each field that only some drafts use must be one of this draft's."""
    for name in SOME_DRAFTS_USE:
        value = getattr(plan, name)
        if name not in fields and value is not None and value is not False:
            raise PlanError(f"{name}={value} has no effect {_where(name, plan, fields)}; leave it out")


def _where(name: str, plan: Plan, fields: frozenset[str]) -> str:
    if name in CHAIN_FIELDS and "draft_length" not in fields:
        return "without a draft"
    return f"with draft={plan.draft}" + (f" and expert_flow={plan.expert_flow}" if name == "draft_kv_bytes" else "")


def check_decoder(plan: Plan, config: ModelConfig) -> None:
    if config.encoder is not None:
        raise PlanError(f"draft={plan.draft} is built for decoders alone; use self, merged or ngram with an encoder-decoder")
