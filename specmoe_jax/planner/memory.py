"""The memory account of a plan: what lies where, and how many expert slots a budget leaves."""

import dataclasses
import math
from typing import NamedTuple

from specmoe_jax.config import Plan
from specmoe_jax.errors import BudgetError, PlanError
from specmoe_jax.layer_config import LayerConfig
from specmoe_jax.model_config import ModelConfig
from specmoe_jax.models.experts import block_bytes
from specmoe_jax.models.families import family_of
from specmoe_jax.models.spec import DTYPE_BYTES, spec_leaves
from specmoe_jax.units import GIB


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
    draft_model_bytes: int = 0  # of a draft of its own: all but what the next two lines count
    draft_kv_bytes: int = 0  # its cache on the accelerator
    draft_pages: int = 0  # of that cache, where it is split; 0: whole rows
    host_draft_bytes: int = 0  # the split cache's other part: as many pages as the target's
    kv_pages: int = 0  # of the host's paged cache (expert_flow=stream), else 0
    hidden_bytes: int = 0  # what waits in host memory of a prompt between two tasks: hidden states, queries, keys, values (stream)
    cross_bytes: int = 0  # keys and values of what an encoder read
    staging_bytes: int = 0  # keys and values of the prompts' chunks that attend on the accelerator, of one layer at a time
    pinned_layers: int = 0  # of the spare-expert cache (expert_flow=stream): its experts are the pinned_slots

    @property
    def host_expert_bytes(self) -> int:
        return self.host_experts * self.expert_bytes

    @property
    def spare_expert_bytes(self) -> int:
        """The spare-expert cache: experts beside the stream, which cross the link once."""
        return self.pinned_slots * self.expert_bytes if self.pinned_layers else 0

    @property
    def accelerator_bytes(self) -> int:
        kv = self.kv_bytes if self.kv_tier == "accelerator" else 0
        experts = (self.num_slots + self.merged_slots) * self.expert_bytes
        beside = self.draft_model_bytes + self.draft_kv_bytes + self.cross_bytes + self.staging_bytes
        return self.weight_bytes + experts + kv + self.activation_bytes + beside

    @property
    def host_bytes(self) -> int:
        kv = self.kv_bytes if self.kv_tier == "host" else 0
        return self.host_expert_bytes + kv + self.hidden_bytes + self.host_draft_bytes


PREFILL_TOKENS = 512  # of one item of a streamed prefill: enough to use an accelerator, few enough to keep others waiting briefly
ITEMS_AHEAD = 3  # prefill items whose activations are alive at a time: dispatch runs ahead (tests/engine/measure_memory.py)
KV_PAGE = 64  # tokens of a page of the host's paged cache: whole blocks of the packed layout, half of one wasted per request


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // KV_PAGE)


class PagedLoad(NamedTuple):
    """What a batch of a streamed plan can fill at once. pages: of the KV cache; prompt_tokens: hidden states of a prefill."""

    pages: int
    prompt_tokens: int


class DraftMemory(NamedTuple):
    """Bytes of a draft of its own: whatever the batch, of each row of it, and of each position of a row in its cache."""

    fixed: int = 0
    row: int = 0
    position: int = 0


def cache_positions(longest: int, plan: Plan) -> int:
    """S: KV positions per row for sequences of `longest` tokens plus the rows a draft may overshoot.

    In steps (powers of two to 1024, then multiples of 1024), so that similar jobs share compiled programs.
    """
    needed = longest + plan.overshoot
    if needed > 1024:
        return -(-needed // 1024) * 1024
    return max(64, 1 << (needed - 1).bit_length())


def prefill_rows(rows: int, chunk: int) -> int:
    """Rows of one item of a streamed prefill in chunks of so many positions."""
    return max(1, min(rows, PREFILL_TOKENS // chunk))


def staged_positions(positions: int, chunk: int) -> int:
    """Whole chunks that hold `positions`."""
    return -(-positions // chunk) * chunk


def account(
    config: ModelConfig,
    plan: Plan,
    *,
    batch_rows: int,
    positions: int,
    source_positions: int = 0,
    draft: DraftMemory = DraftMemory(),  # noqa: B008 (immutable)
    paged: PagedLoad | None = None,
) -> MemoryAccount:
    """The account of a plan for `batch_rows` rows of `positions` KV positions, within its budgets.

    source_positions: what the encoder reads of each row, where there is one.

    The pool gets what the plan can use (pinned experts, and one layer's whole dispatch), or what the budget
    leaves. draft: what a separate draft model or head takes; a streamed plan's draft cache gets what is left beside all else, at
    most plan.draft_kv_bytes, and where that is not all of it, pages in host memory too. paged: under expert_flow=stream, None
    for rows that are all of the longest; where host memory is short the cache gets fewer pages, and so fewer rows run at a time.
    Raises BudgetError with the shortage and the smallest budget that works (fit.accounted says what would fit, too).
    """
    item = DTYPE_BYTES[plan.dtype]
    passes = max(plan.tokens_per_pass, plan.prefill_chunk) * batch_rows  # tokens of the largest pass
    streams = plan.expert_flow == "stream"
    passes = plan.tokens_per_pass * batch_rows + ITEMS_AHEAD * PREFILL_TOKENS if streams else passes
    if streams and paged is None:
        paged = PagedLoad(pages=batch_rows * pages_of(positions), prompt_tokens=batch_rows * positions)
    everything = config.num_expert_layers * config.num_experts
    pinned_layers = plan.pinned_layers or 0
    pinned = pinned_layers * config.num_experts if streams else sum(pinned_experts(config, plan))
    dispatch = min(config.num_experts, passes * config.experts_per_token)
    wanted = pinned + (0 if pinned == everything else dispatch)
    wanted = _streamed_layers(config, plan, pinned_layers) * config.num_experts if streams else wanted
    cached = paged.pages * KV_PAGE if streams else batch_rows * positions
    whole = MemoryAccount(
        weight_bytes=sum(spec.size for spec in spec_leaves(family_of(config).weight_specs(config))) * item,
        expert_bytes=block_bytes(dataclasses.replace(config.experts, packing=plan.expert_dtype), plan.dtype),
        num_slots=wanted + _spare_slots(plan, dispatch),
        wanted_slots=wanted,
        pinned_slots=pinned,
        merged_slots=config.num_moe_layers * (plan.draft_experts or 0) if plan.draft == "merged" else 0,
        kv_bytes=cached * _position_bytes(config, item),
        activation_bytes=max(
            _activation_bytes(config, plan, batch_rows, passes, item), _encoder_bytes(config, batch_rows, source_positions, item)
        ),
        host_experts=everything,
        kv_tier=plan.kv_tier,
        draft_model_bytes=draft.fixed + batch_rows * draft.row,
        draft_kv_bytes=batch_rows * positions * draft.position,
        kv_pages=paged.pages if streams else 0,
        hidden_bytes=paged.prompt_tokens * (config.hidden_size + max(map(_heads, config.layers))) * item if streams else 0,
        cross_bytes=sum(2 * batch_rows * source_positions * _cross_row(layer) for layer in config.layers) * item,
        staging_bytes=_staging_bytes(config, plan, batch_rows, positions, item),
        pinned_layers=pinned_layers,
    )
    whole = _split_draft(whole, plan, KV_PAGE * draft.position)
    fitted = _fit_device(_fit_host(_fit_pages(whole, plan, positions), plan), plan)
    return _with_spare_experts(fitted, config, plan) if streams else fitted


def pinned_experts(config: ModelConfig, plan: Plan) -> tuple[int, ...]:
    """[L], experts of each layer that stay on the accelerator between passes."""
    if plan.expert_flow == "resident":
        return (config.num_experts,) * config.num_moe_layers
    pinned = (plan.draft_experts if plan.draft == "self" else plan.cached_experts) or 0
    return pinned if isinstance(pinned, tuple) else (pinned,) * config.num_moe_layers


def _streamed_layers(config: ModelConfig, plan: Plan, pinned_layers: int) -> int:
    """Layers of experts on the accelerator: the pinned ones and the buffers, which nobody needs when all are pinned."""
    return pinned_layers + (plan.layer_buffers if pinned_layers < config.num_moe_layers else 0)


def _with_spare_experts(whole: MemoryAccount, config: ModelConfig, plan: Plan) -> MemoryAccount:
    """What the budget leaves, filled with whole layers (SpecMoEOff, memory manager: spare memory to a static expert cache).

    Whole layers, because a part of each would need a kernel of two pools, and an expert of every layer is more than a layer
    where there are more layers than experts. Without a budget there is nothing to fill.
    """
    if plan.pinned_layers is not None or plan.device_memory_bytes is None:
        return whole
    beside = whole.accelerator_bytes - whole.num_slots * whole.expert_bytes
    room = int(plan.device_memory_bytes - beside) // (config.num_experts * whole.expert_bytes)
    pinned = config.num_moe_layers if room >= config.num_moe_layers else room - plan.layer_buffers
    slots = _streamed_layers(config, plan, pinned) * config.num_experts
    return whole._replace(num_slots=slots, wanted_slots=slots, pinned_slots=pinned * config.num_experts, pinned_layers=pinned)


def _spare_slots(plan: Plan, dispatch: int) -> int:
    if plan.prefetch != "draft":
        return 0
    return dispatch if plan.spare_slots is None else plan.spare_slots


def _cache_row(layer: LayerConfig) -> int:
    """Numbers that one position of one row takes in the key cache of a layer, and again in its value cache."""
    return layer.attention.num_kv_heads * layer.attention.cache_dim


def _position_bytes(config: ModelConfig, item: int) -> int:
    """Keys and values of one position of one row, in all layers."""
    return 2 * sum(map(_cache_row, config.layers)) * item


def _activation_bytes(config: ModelConfig, plan: Plan, batch_rows: int, passes: int, item: int) -> int:
    """Largest live activations: residual, expert inputs and outputs of a pass, and the logits of a verification."""
    heads = max(_heads(layer) for layer in config.layers)
    per_token = (2 * config.hidden_size + heads) * item
    outputs = config.experts_per_token * config.hidden_size * 4
    logits = batch_rows * plan.tokens_per_pass * config.vocab_size * 4
    return passes * (per_token + outputs) + logits


def _staging_bytes(config: ModelConfig, plan: Plan, batch_rows: int, positions: int, item: int) -> int:
    """Of the longest prompts at the plan's chunk; shorter chunks are of prompts that are one chunk."""
    if plan.prefill_attention != "accelerator":
        return 0
    tokens = prefill_rows(batch_rows, plan.prefill_chunk) * staged_positions(positions, plan.prefill_chunk)
    return 2 * max(tokens, PREFILL_TOKENS) * max(map(_cache_row, config.layers)) * item


def _cross_row(layer: LayerConfig) -> int:
    """As _cache_row, of what the encoder read."""
    return 0 if layer.cross is None else layer.cross.num_kv_heads * layer.cross.head_dim


def _encoder_bytes(config: ModelConfig, batch_rows: int, positions: int, item: int) -> int:
    """Largest live activations of the encoder: as of a pass, and scores in full (twice: themselves and their softmax)."""
    if config.encoder is None:
        return 0
    heads = max(layer.attention.num_heads for layer in config.encoder.layers)
    width = max(_heads(layer) for layer in config.encoder.layers)
    per_token = (2 * config.hidden_size + width) * item + config.experts_per_token * config.hidden_size * 4
    return batch_rows * positions * (per_token + 2 * heads * positions * 4)


def _heads(layer: LayerConfig) -> int:
    """Numbers of the queries, keys and values of one token."""
    return (layer.attention.num_heads + 2 * layer.attention.num_kv_heads) * layer.attention.cache_dim


def _split_draft(whole: MemoryAccount, plan: Plan, page_bytes: int) -> MemoryAccount:
    """With as much of a streamed plan's draft cache on the accelerator as may be there (SpecMoEOff 4), and room for the rest."""
    if plan.draft != "eagle" or not whole.kv_pages or not page_bytes:
        return whole
    room = whole.draft_kv_bytes
    if plan.draft_kv_bytes is not None:
        if plan.draft_kv_bytes < page_bytes:
            raise PlanError(
                f"draft_kv_bytes is {plan.draft_kv_bytes}, less than one page of the draft's cache, {_size(page_bytes)}; the "
                f"smallest that works is --draft_kv_gib={_ceil_gib(page_bytes)}"
            )
        room = min(room, plan.draft_kv_bytes)
    if plan.device_memory_bytes is not None:
        room = min(room, plan.device_memory_bytes - (whole.accelerator_bytes - whole.draft_kv_bytes))
    if room >= whole.draft_kv_bytes:
        return whole
    pages = max(int(room // page_bytes), 1)  # where there is no room for one page the device's own refusal says so
    return whole._replace(draft_pages=pages, draft_kv_bytes=pages * page_bytes, host_draft_bytes=whole.kv_pages * page_bytes)


def _fit_pages(whole: MemoryAccount, plan: Plan, positions: int) -> MemoryAccount:
    """With as many pages as host memory leaves, at least those of the longest request; the prompts' hidden states shrink alike."""
    if not whole.kv_pages or plan.host_memory_bytes is None or whole.host_bytes <= plan.host_memory_bytes:
        return whole
    beside = 0 if plan.expert_tier == "disk" else whole.host_expert_bytes
    page = (whole.kv_bytes + whole.hidden_bytes + whole.host_draft_bytes) / whole.kv_pages
    pages, one = int((plan.host_memory_bytes - beside) // page), pages_of(positions)
    if pages < one:
        raise BudgetError(
            f"host memory of {_size(plan.host_memory_bytes)} is too small: experts take {_size(beside)} and one request of "
            f"{positions} positions {_size(one * page)}, {_short(beside + one * page, plan.host_memory_bytes)}; the "
            f"smallest that works is --host_memory_gib={_ceil_gib(beside + one * page)}"
        )
    share = pages / whole.kv_pages
    return whole._replace(
        kv_pages=pages,
        kv_bytes=whole.kv_bytes // whole.kv_pages * pages,
        hidden_bytes=int(whole.hidden_bytes * share),
        host_draft_bytes=whole.host_draft_bytes // whole.kv_pages * pages,
    )


def _fit_host(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    if plan.host_memory_bytes is None or whole.host_bytes <= plan.host_memory_bytes:
        return whole
    beside = whole.host_bytes - whole.host_expert_bytes
    if plan.expert_tier == "host":
        raise BudgetError(
            f"host memory of {_size(plan.host_memory_bytes)} is too small: experts and KV cache need "
            f"{_size(whole.host_bytes)}, {_short(whole.host_bytes, plan.host_memory_bytes)}; give "
            f"--host_memory_gib={_ceil_gib(whole.host_bytes)} or a smaller batch, or leave experts on disk: --expert_tier=disk"
        )
    cached = int(plan.host_memory_bytes - beside) // whole.expert_bytes
    if cached < 1:
        need = beside + whole.expert_bytes
        raise BudgetError(
            f"host memory of {_size(plan.host_memory_bytes)} is too small to cache one expert of the disk tier"
            f"{' beside the KV cache' if beside else ''}, {_short(need, plan.host_memory_bytes)}; the smallest that works is "
            f"--host_memory_gib={_ceil_gib(need)}"
        )
    return whole._replace(host_experts=cached)


def _fit_device(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    if plan.device_memory_bytes is None:
        return whole
    beside = whole.accelerator_bytes - whole.num_slots * whole.expert_bytes
    slots = int(plan.device_memory_bytes - beside) // whole.expert_bytes
    # One free slot carries a dispatch, wave by wave; streaming needs both of its buffers.
    smallest = whole.num_slots if plan.expert_flow == "stream" else min(whole.pinned_slots + 1, whole.num_slots)
    if slots < smallest:
        need = beside + smallest * whole.expert_bytes
        raise BudgetError(
            f"device memory of {_size(plan.device_memory_bytes)} is too small for {_what_for(plan)}: weights, KV "
            f"cache and activations take {_size(beside)}, {smallest} expert slots {_size(smallest * whole.expert_bytes)}, "
            f"{_short(need, plan.device_memory_bytes)}; the smallest that works is --device_memory_gib={_ceil_gib(need)}"
            + (", or fewer draft experts" if plan.draft_experts else "")
            + (", or fewer pinned layers" if plan.pinned_layers else "")
        )
    return whole._replace(num_slots=min(slots, whole.num_slots))


def _short(need: float, budget: float) -> str:
    """The shortage."""
    return f"{_size(need - budget)} short"


def _what_for(plan: Plan) -> str:
    if plan.expert_flow != "stream":
        return "one layer's dispatch"
    return f"{f'{plan.pinned_layers} pinned layers and ' if plan.pinned_layers else ''}{plan.layer_buffers} layers' experts"


def _size(num_bytes: float) -> str:
    """For people: the largest unit that leaves a digit before the point."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _ceil_gib(num_bytes: float) -> str:
    """Rounded up to six digits, so that the number given is one that works."""
    return f"{math.ceil(num_bytes * 10**6 / GIB) / 10**6:.6f}"
