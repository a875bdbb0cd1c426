"""The checks of a plan: of the values of its fields, and that each has an effect under the others."""

from typing import TYPE_CHECKING

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_fields import (
    DRAFT_SETS,
    DRAFTS,
    DRAM_POLICIES,
    DTYPES,
    EXPERT_DTYPES,
    EXPERT_FLOWS,
    EXPERT_TIERS,
    GATED_DRAFTS,
    KV_TIERS,
    MAX_TREE,
    PER_LAYER,
    PREFETCHES,
    PREFILL_ATTENTIONS,
    SUBSTITUTIONS,
    TREE_DRAFTS,
    most,
)
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.validation import is_number, is_whole

if TYPE_CHECKING:
    from specmoe_jax.config.plan import Plan


def check_plan(plan: "Plan", config: ModelConfig) -> None:
    """Raises PlanError naming the field, its value and what would work."""
    _check_choices(plan)
    _check_types(plan)
    _check_draft(plan, config)
    _check_effects(plan, config)
    plan.flow.check(plan, config)


def _check_choices(plan: "Plan") -> None:
    for name, choices in (
        ("draft", DRAFTS),
        ("expert_flow", EXPERT_FLOWS),
        ("expert_tier", EXPERT_TIERS),
        ("dram_policy", (None, *DRAM_POLICIES)),
        ("kv_tier", KV_TIERS),
        ("dtype", DTYPES),
        ("expert_dtype", (None, *EXPERT_DTYPES)),
        ("prefetch", PREFETCHES),
        ("prefill_attention", (None, *PREFILL_ATTENTIONS)),
        ("draft_set", (None, *DRAFT_SETS)),
        ("substitution", (None, *SUBSTITUTIONS)),
    ):
        if getattr(plan, name) not in choices:
            choices = [choice for choice in choices if choice is not None]
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be one of {', '.join(choices)}")


def _check_types(plan: "Plan") -> None:
    for name in PER_LAYER:
        value = getattr(plan, name)
        if value is not None and not (isinstance(value, tuple) and value and all(is_whole(n) and n >= 1 for n in value)):
            if not is_whole(value) or value < 1:
                raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1, or a tuple of one for each layer")
    for name in (
        "draft_length",
        "draft_tree_top_k",
        "draft_tree_tokens",
        "spare_slots",
        "batch_size",
        "micro_batches",
        "layer_buffers",
        "prefill_chunk",
    ):
        value = getattr(plan, name)
        optional = name not in ("batch_size", "micro_batches", "layer_buffers", "prefill_chunk")
        if not (optional and value is None) and (not is_whole(value) or value < 1):
            raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1")
    pinned = plan.pinned_layers
    if pinned is not None and (not is_whole(pinned) or pinned < 0):
        raise PlanError(f"pinned_layers is {pinned!r}; it must be a whole number, 0 or more")
    for name in ("device_memory_bytes", "host_memory_bytes", "draft_kv_bytes", "link_bytes_per_s"):
        value = getattr(plan, name)
        if value is not None and (not is_number(value) or value <= 0):
            raise PlanError(f"{name} is {value!r}; it must be a finite number above 0")
    for name in ("guard", "bypass_page_cache"):
        if not isinstance(getattr(plan, name), bool):
            raise PlanError(f"{name} is {getattr(plan, name)!r}; it must be true or false")


def _check_draft(plan: "Plan", config: ModelConfig) -> None:
    if plan.draft != "none" and plan.draft_length is None:
        raise PlanError(f"draft={plan.draft} needs a draft_length, for example 4")
    if plan.draft in ("model", "eagle") and config.encoder is not None:
        raise PlanError(f"draft={plan.draft} is built for decoders alone; use self, merged or ngram with an encoder-decoder")
    for name in PER_LAYER:
        value = getattr(plan, name)
        if isinstance(value, tuple) and len(value) != config.num_moe_layers:
            raise PlanError(f"{name} has {len(value)} numbers; the model has {config.num_moe_layers} layers with experts")
    if plan.draft == "merged" and isinstance(plan.draft_experts, tuple):
        raise PlanError(f"draft_experts is {plan.draft_experts}; draft=merged takes one number for all layers")
    if plan.draft in GATED_DRAFTS and (plan.draft_experts is None or most(plan.draft_experts) > config.num_experts):
        raise PlanError(
            f"draft_experts is {plan.draft_experts}; draft={plan.draft} needs 1 to {config.num_experts}, the experts of a layer"
        )
    if plan.cached_experts is not None and most(plan.cached_experts) > config.num_experts:
        raise PlanError(f"cached_experts is {plan.cached_experts}; a layer has {config.num_experts} experts")
    _check_tree(plan, config)
    rate = plan.synthetic_acceptance
    if rate is not None and not (is_number(rate) and 0 <= rate <= 1):
        raise PlanError(f"synthetic_acceptance is {rate!r}; it must be a probability")


def _check_tree(plan: "Plan", config: ModelConfig) -> None:
    """Sizes that the attention kernel takes (a tree mask of 64) and that the tree can have."""
    top_k, tokens = plan.draft_tree_top_k, plan.draft_tree_tokens
    if (top_k is None) != (tokens is None):
        raise PlanError(f"draft_tree_top_k is {top_k} and draft_tree_tokens is {tokens}; give both, or none for a chain")
    if plan.draft not in TREE_DRAFTS or top_k is None or tokens is None:
        return
    largest = min(top_k + (plan.draft_length - 1) * top_k**2, MAX_TREE - 1)
    if plan.tree_rows > MAX_TREE or top_k > config.vocab_size:
        raise PlanError(
            f"draft_tree_top_k is {top_k}; with draft_length={plan.draft_length} at most "
            f"{min(MAX_TREE // max(plan.draft_length - 1, 1), config.vocab_size)} branches can be grown"
        )
    if not plan.draft_length <= tokens <= largest:
        raise PlanError(
            f"draft_tree_tokens is {tokens}; a tree of depth draft_length={plan.draft_length} with {top_k} branches has "
            f"{plan.draft_length} to {largest} nodes to verify"
        )
    if plan.guard:
        raise PlanError("guard=True adapts the length of a chain, not a tree; leave out guard or the draft_tree fields")
    if plan.synthetic_acceptance is not None:
        raise PlanError("synthetic_acceptance is for chains; leave it out or the draft_tree fields")


def _check_effects(plan: "Plan", config: ModelConfig) -> None:
    """Each line: fields that need a condition, the condition, and what to do without it."""
    needs = (
        (("draft_length", "guard", "synthetic_acceptance"), plan.draft != "none", "without a draft"),
        (("draft_experts",), plan.draft in GATED_DRAFTS, f"with draft={plan.draft}"),
        (("draft_tree_top_k", "draft_tree_tokens"), plan.draft in TREE_DRAFTS, f"with draft={plan.draft}"),
        (("draft_kv_bytes",), plan.draft == "eagle", f"with draft={plan.draft}"),
        (("draft_set", "substitution"), plan.draft == "self", f"with draft={plan.draft}"),
        (("cached_experts",), plan.draft != "self", "with draft=self, which keeps its draft experts"),
        (("spare_slots",), plan.prefetch == "draft", f"with prefetch={plan.prefetch}"),
        (("dram_policy", "bypass_page_cache"), plan.expert_tier == "disk", "where every expert is in host memory"),
    )
    for names, condition, where in needs:
        for name in names:
            value = getattr(plan, name)
            if not condition and value is not None and value is not False:
                raise PlanError(f"{name}={value} has no effect {where}; leave it out")
    if plan.prefetch == "draft" and plan.draft not in GATED_DRAFTS:
        raise PlanError(f"prefetch=draft has no effect with draft={plan.draft}: its gates tell nothing; use draft=self")
    if plan.substitution == "distinct" and config.experts_per_token == 1:
        raise PlanError("substitution=distinct has no effect where a token chooses one expert; leave it out")
    if plan.expert_dtype is not None and (plan.expert_tier == "disk" or plan.draft == "merged"):
        what = "expert_tier=disk" if plan.expert_tier == "disk" else "draft=merged"
        raise PlanError(
            f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without {what}; leave one out"
        )
    if plan.prefetch == "oracle" and plan.link_bytes_per_s is None:
        raise PlanError("prefetch=oracle knows the future, which only an emulated link can; give --link_gbps")
    if plan.expert_tier == "disk" and plan.host_memory_bytes is None:
        raise PlanError("expert_tier=disk needs the host memory to cache experts in; give --host_memory_gib")
