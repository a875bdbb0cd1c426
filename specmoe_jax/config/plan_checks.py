"""The checks of a plan: of the values of its fields, and that each has an effect under the others."""

from typing import TYPE_CHECKING

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_fields import (
    DRAFT_SETS,
    DRAM_POLICIES,
    DTYPES,
    EXPERT_DTYPES,
    EXPERT_FLOWS,
    EXPERT_TIERS,
    KV_TIERS,
    PER_LAYER,
    PREFETCHES,
    PREFILL_ATTENTIONS,
    SUBSTITUTIONS,
    most,
)
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.validation import is_number, is_whole

if TYPE_CHECKING:
    from specmoe_jax.config.plan import Plan


def check_plan(plan: "Plan", config: ModelConfig) -> None:
    """Raises PlanError naming the field, its value and what would work."""
    _check_choices(plan)
    _check_types(plan)
    _check_model(plan, config)
    plan.drafting.check(plan, config)
    _check_effects(plan, config)


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


def _check_model(plan: "Plan", config: ModelConfig) -> None:
    """Values that the model or a probability limits."""
    for name in PER_LAYER:
        value = getattr(plan, name)
        if isinstance(value, tuple) and len(value) != config.num_moe_layers:
            raise PlanError(f"{name} has {len(value)} numbers; the model has {config.num_moe_layers} layers with experts")
    if plan.cached_experts is not None and most(plan.cached_experts) > config.num_experts:
        raise PlanError(f"cached_experts is {plan.cached_experts}; a layer has {config.num_experts} experts")
    rate = plan.synthetic_acceptance
    if rate is not None and not (is_number(rate) and 0 <= rate <= 1):
        raise PlanError(f"synthetic_acceptance is {rate!r}; it must be a probability")


def _check_effects(plan: "Plan", config: ModelConfig) -> None:
    """Each line: fields that need a condition, the condition, and what to do without it."""
    needs = (
        (("spare_slots",), plan.prefetch == "draft", f"with prefetch={plan.prefetch}"),
        (("pinned_layers", "prefill_attention"), plan.expert_flow == "stream", f"with expert_flow={plan.expert_flow}"),
        (("dram_policy", "bypass_page_cache"), plan.expert_tier == "disk", "where every expert is in host memory"),
        (("cached_experts", "link_bytes_per_s", "retain"), plan.expert_flow != "resident", "where every expert is resident"),
    )
    for names, condition, where in needs:
        for name in names:
            value = getattr(plan, name)
            if not condition and value is not None and value is not False:
                raise PlanError(f"{name}={value} has no effect {where}; leave it out")
    if plan.substitution == "distinct" and config.experts_per_token == 1:
        raise PlanError("substitution=distinct has no effect where a token chooses one expert; leave it out")
    if plan.expert_dtype is not None and plan.expert_tier == "disk":
        raise PlanError(
            f"expert_dtype={plan.expert_dtype} is built for packed experts in host memory, without expert_tier=disk; leave one out"
        )
    if plan.prefetch == "oracle" and plan.link_bytes_per_s is None:
        raise PlanError("prefetch=oracle knows the future, which only an emulated link can; give --link_gbps")
    if plan.expert_tier == "disk" and plan.host_memory_bytes is None:
        raise PlanError("expert_tier=disk needs the host memory to cache experts in; give --host_memory_gib")
    if plan.expert_flow == "stream" and config.encoder is not None:
        raise PlanError("expert_flow=stream is built for decoders alone; use on_demand with an encoder-decoder")
    if plan.expert_flow == "stream":
        _check_stream(plan, config)
    elif plan.micro_batches != 1:
        raise PlanError(f"micro_batches={plan.micro_batches} has no effect with expert_flow={plan.expert_flow}; leave it 1")
    elif plan.layer_buffers != 2:
        raise PlanError(f"layer_buffers={plan.layer_buffers} has no effect with expert_flow={plan.expert_flow}; leave it 2")


def _check_stream(plan: "Plan", config: ModelConfig) -> None:
    """Streaming keeps no expert between passes and asks no router what to bring."""
    if plan.kv_tier != "host":
        raise PlanError(f"expert_flow=stream keeps the KV cache in host memory; got kv_tier={plan.kv_tier}, give kv_tier=host")
    if plan.cached_experts is not None or plan.retain or plan.prefetch != "none":
        raise PlanError(
            "cached_experts, retain and prefetch have no effect with expert_flow=stream, which brings every expert; leave them "
            "out, or use pinned_layers"
        )
    if not 2 <= plan.layer_buffers <= max(config.num_moe_layers, 2):
        raise PlanError(
            f"layer_buffers={plan.layer_buffers}; streaming takes 2 to {max(config.num_moe_layers, 2)}, the layers with experts"
        )
    _check_pinned_layers(plan, config)
    if plan.micro_batches > plan.batch_size:
        raise PlanError(f"micro_batches={plan.micro_batches} of batch_size={plan.batch_size} rows; give at most as many as rows")


def _check_pinned_layers(plan: "Plan", config: ModelConfig) -> None:
    layers, pinned = config.num_moe_layers, plan.pinned_layers or 0
    if pinned and pinned != layers and pinned + plan.layer_buffers > layers:
        raise PlanError(
            f"pinned_layers={pinned} and {plan.layer_buffers} layer buffers for {layers} layers with experts; give {layers}, which "
            f"takes less, or at most {max(layers - plan.layer_buffers, 0)}"
        )
    for name, plain in (("link_bytes_per_s", None), ("layer_buffers", 2)):
        if pinned == layers and getattr(plan, name) != plain:
            raise PlanError(f"{name}={getattr(plan, name)} has no effect with all {layers} layers pinned; leave it out")
