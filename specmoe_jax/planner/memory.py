"""The memory account of a plan: what lies where, and how many expert slots a budget leaves."""

from typing import NamedTuple

from specmoe_jax.config import GIB, ModelConfig, Plan
from specmoe_jax.errors import PlanError
from specmoe_jax.layer_config import LayerConfig
from specmoe_jax.models.families import family_of
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves


class MemoryAccount(NamedTuple):
    """Bytes by tier and purpose, and the slots R of the expert pool.

    merged_slots are further ones, which hold merged experts for good.
    pinned_slots of them hold experts that stay between passes; with wanted_slots every dispatch fits at once, and
    what is beyond holds prefetched experts.
    """

    weight_bytes: int
    expert_bytes: int  # one expert
    num_slots: int
    wanted_slots: int
    pinned_slots: int
    merged_slots: int
    kv_bytes: int
    activation_bytes: int
    host_experts: int  # experts in host memory: all, or as many as the budget lets a disk tier cache
    kv_tier: str
    draft_model_bytes: int = 0

    @property
    def host_expert_bytes(self) -> int:
        return self.host_experts * self.expert_bytes

    @property
    def accelerator_bytes(self) -> int:
        kv = self.kv_bytes if self.kv_tier == "accelerator" else 0
        experts = (self.num_slots + self.merged_slots) * self.expert_bytes
        return self.weight_bytes + experts + kv + self.activation_bytes + self.draft_model_bytes

    @property
    def host_bytes(self) -> int:
        return self.host_expert_bytes + (self.kv_bytes if self.kv_tier == "host" else 0)


def cache_positions(longest: int, plan: Plan) -> int:
    """S: KV positions per row for sequences of `longest` tokens plus the rows a draft may overshoot.

    In steps (powers of two to 1024, then multiples of 1024), so that similar jobs share compiled programs.
    """
    needed = longest + plan.tokens_per_pass
    if needed > 1024:
        return -(-needed // 1024) * 1024
    return max(64, 1 << (needed - 1).bit_length())


def account(config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, draft_model_bytes: int = 0) -> MemoryAccount:
    """The account of a plan for `batch_rows` rows of `positions` KV positions, within its budgets.

    The pool gets what the plan can use (pinned experts, and one layer's whole dispatch), or what the budget
    leaves. draft_model_bytes: what a separate draft model or head takes. Raises PlanError with the shortage and the smallest
    budget that works.
    """
    item = DTYPE_BYTES[plan.dtype]
    passes = max(plan.tokens_per_pass, plan.prefill_chunk) * batch_rows  # tokens of the largest pass
    pinned = sum(pinned_experts(config, plan))
    dispatch = min(config.num_experts, passes * config.experts_per_token)
    wanted = pinned + (0 if pinned == config.num_moe_layers * config.num_experts else dispatch)
    whole = MemoryAccount(
        weight_bytes=sum(spec.size for spec in spec_leaves(family_of(config).weight_specs(config))) * item,
        expert_bytes=config.expert_params * item,
        num_slots=wanted + _spare_slots(plan, dispatch),
        wanted_slots=wanted,
        pinned_slots=pinned,
        merged_slots=config.num_moe_layers * (plan.draft_experts or 0) if plan.draft == "merged" else 0,
        kv_bytes=2 * sum(batch_rows * positions * _cache_row(layer) for layer in config.layers) * item,
        activation_bytes=_activation_bytes(config, plan, batch_rows, passes, item),
        host_experts=config.num_moe_layers * config.num_experts,
        kv_tier=plan.kv_tier,
        draft_model_bytes=draft_model_bytes,
    )
    return _fit_device(_fit_host(whole, plan), plan)


def pinned_experts(config: ModelConfig, plan: Plan) -> tuple[int, ...]:
    """[L], experts of each layer that stay on the accelerator between passes."""
    if plan.expert_flow == "resident":
        return (config.num_experts,) * config.num_moe_layers
    pinned = (plan.draft_experts if plan.draft == "self" else plan.cached_experts) or 0
    return pinned if isinstance(pinned, tuple) else (pinned,) * config.num_moe_layers


def _spare_slots(plan: Plan, dispatch: int) -> int:
    if plan.prefetch != "draft":
        return 0
    return dispatch if plan.spare_slots is None else plan.spare_slots


def _cache_row(layer: LayerConfig) -> int:
    """Numbers that one position of one row takes in the key cache of a layer, and again in its value cache."""
    return layer.attention.num_kv_heads * layer.attention.cache_dim


def _activation_bytes(config: ModelConfig, plan: Plan, batch_rows: int, passes: int, item: int) -> int:
    """Largest live activations: residual, expert inputs and outputs of a pass, and the logits of a verification."""
    heads = max(_heads(layer) for layer in config.layers)
    per_token = (2 * config.hidden_size + heads) * item
    outputs = config.experts_per_token * config.hidden_size * 4
    logits = batch_rows * plan.tokens_per_pass * config.vocab_size * 4
    return passes * (per_token + outputs) + logits


def _heads(layer: LayerConfig) -> int:
    """Numbers of the queries, keys and values of one token."""
    return (layer.attention.num_heads + 2 * layer.attention.num_kv_heads) * layer.attention.cache_dim


def _fit_host(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    if plan.host_memory_bytes is None or whole.host_bytes <= plan.host_memory_bytes:
        return whole
    beside = whole.host_bytes - whole.host_expert_bytes
    if plan.expert_tier == "host":
        raise PlanError(
            f"host memory of {_size(plan.host_memory_bytes)} is too small: experts and KV cache need "
            f"{_size(whole.host_bytes)}; give --host_memory_gib={_ceil_gib(whole.host_bytes)} or a smaller batch, "
            "or leave experts on disk: --expert_tier=disk"
        )
    cached = int(plan.host_memory_bytes - beside) // whole.expert_bytes
    if cached < 1:
        need = beside + whole.expert_bytes
        raise PlanError(
            f"host memory of {_size(plan.host_memory_bytes)} is too small to cache one expert of the disk tier"
            f"{' beside the KV cache' if beside else ''}; the smallest that works is --host_memory_gib={_ceil_gib(need)}"
        )
    return whole._replace(host_experts=cached)


def _fit_device(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    if plan.device_memory_bytes is None:
        return whole
    beside = whole.accelerator_bytes - whole.num_slots * whole.expert_bytes
    slots = int(plan.device_memory_bytes - beside) // whole.expert_bytes
    smallest = min(whole.pinned_slots + 1, whole.num_slots)  # one free slot carries a dispatch, wave by wave
    if slots < smallest:
        need = beside + smallest * whole.expert_bytes
        raise PlanError(
            f"device memory of {_size(plan.device_memory_bytes)} is too small for one layer's dispatch: weights, KV "
            f"cache and activations take {_size(beside)}, {smallest} expert slots {_size(smallest * whole.expert_bytes)}; "
            f"the smallest that works is --device_memory_gib={_ceil_gib(need)}"
            + (", or fewer draft experts" if plan.draft_experts else "")
        )
    return whole._replace(num_slots=min(slots, whole.num_slots))


def _size(num_bytes: float) -> str:
    """For people: the largest unit that leaves a digit before the point."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _ceil_gib(num_bytes: int) -> str:
    """Rounded up to six digits, so that the number given is one that works."""
    return f"{-(-num_bytes * 10**6 // GIB) / 10**6:.6f}"
