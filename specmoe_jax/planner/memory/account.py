"""The memory account of a plan: bytes by tier, and the expert slots that a budget leaves."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.kv_cache.rows import rows_of_device
from specmoe_jax.models.experts import layer_bytes, mean_bytes
from specmoe_jax.models.packing.dense import weight_bytes
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.offload.homes import most_experts, most_of_process
from specmoe_jax.planner.memory.budgets import fit_device, fit_host, fit_pages, split_draft
from specmoe_jax.planner.memory.footprint import (
    activation_bytes,
    attention_bytes,
    cross_row,
    encoder_bytes,
    position_bytes,
    staging_bytes,
    state_bytes,
    token_numbers,
)
from specmoe_jax.planner.memory.memory_account import DraftMemory, MemoryAccount, PagedLoad


def account(
    config: ModelConfig,
    plan: Plan,
    *,
    batch_rows: int,
    positions: int,
    source_positions: int = 0,
    draft: DraftMemory = DraftMemory(),  # noqa: B008 (immutable)
    paged: PagedLoad | None = None,
    accelerator_is_cpu: bool = True,
    beside_rows: int = 0,
) -> MemoryAccount:
    """The account of a plan for `batch_rows` rows of `positions` KV positions, within its budgets, and of one of its devices.

    Of several devices each has the cache of its rows, where there are as many for each. source_positions: what the encoder reads of
    each row, where there is one. accelerator_is_cpu: the accelerator is the CPU itself, which copies an expert into its slot and
    multiplies it there; any other holds some beside the slots meanwhile. beside_rows: further ones in caches of their own, taken to
    be whole on each device.

    The pool gets what the plan can use (pinned experts, and one layer's whole dispatch), or what the budget
    leaves. draft: what a separate draft model or head takes; a streamed plan's draft cache gets what is left beside all else, at
    most plan.draft_kv_bytes, and where that is not all of it, pages in host memory too. paged: of a flow with a paged cache,
    None for rows that are all of the longest; where host memory is short the cache gets fewer pages, and so fewer rows run at
    a time.
    Raises BudgetError with the shortage and the smallest budget that works (fit.accounted says what would fit, too).
    """
    itemsize, on_host = DTYPE_BYTES[plan.dtype], plan.cache_tier.on_host
    own_rows = beside_rows + (batch_rows if on_host else rows_of_device(batch_rows, plan.devices))
    batch_rows += beside_rows
    needs = plan.flow.memory(config, plan, batch_rows=batch_rows, positions=positions, paged=paged)
    prompt_tokens = needs.paged.prompt_tokens if needs.paged else 0

    def own(count: int) -> int:
        """Of what all rows have alike."""
        return count * own_rows // max(batch_rows, 1)

    whole = MemoryAccount(
        weight_bytes=weight_bytes(config, plan.dtype, plan.dense_dtype),
        expert_bytes=mean_bytes(config, plan.dtype, plan.expert_dtype),
        slot_bytes=max(layer_bytes(config, plan.dtype, plan.expert_dtype)),
        num_slots=needs.wanted_slots + _spare_slots(plan, needs.dispatch),
        wanted_slots=needs.wanted_slots,
        pinned_slots=needs.pinned_slots,
        merged_slots=most_experts(plan.devices, plan.drafting.merged_slots(plan, config)),
        kv_bytes=own(needs.cached_positions) * position_bytes(config, itemsize),
        state_bytes=state_bytes(config, own_rows, plan.tokens_per_pass - 1),
        activation_bytes=max(
            activation_bytes(config, plan, batch_rows, needs.pass_tokens, itemsize, own=own(needs.pass_tokens)),
            encoder_bytes(config, batch_rows, source_positions, itemsize),
        ),
        host_experts=config.num_expert_layers * most_of_process(plan.num_processes, plan.devices, config.num_experts),
        kv_on_host=on_host,
        draft_model_bytes=draft.fixed + batch_rows * draft.row,
        draft_kv_bytes=batch_rows * positions * draft.position,
        host_draft_bytes=draft.host,
        kv_pages=needs.paged.pages if needs.paged else 0,
        hidden_bytes=prompt_tokens
        * (plan.devices // plan.num_processes * config.state_numbers + max(map(token_numbers, config.layers)))
        * itemsize
        + plan.devices // plan.num_processes * own(needs.waiting_tokens) * (config.state_numbers * itemsize + draft.watched),
        cross_bytes=sum(2 * batch_rows * source_positions * cross_row(layer) for layer in config.layers) * itemsize,
        staging_bytes=staging_bytes(config, plan, batch_rows, positions, itemsize),
        pinned_layers=needs.pinned_layers,
    )
    if not accelerator_is_cpu:
        whole = _beside_a_cpu(whole, config, plan, own_rows, positions)
    whole = split_draft(whole, plan, KV_PAGE * draft.position)
    fitted = fit_device(fit_host(fit_pages(whole, plan, positions), plan), plan)
    return plan.flow.fill_budget(fitted, config, plan)


def _beside_a_cpu(whole: MemoryAccount, config: ModelConfig, plan: Plan, rows: int, positions: int) -> MemoryAccount:
    """What only an accelerator beside the CPU holds: experts under way, and what attention over its own rows makes meanwhile."""
    moving = plan.flow.moving_experts(config, whole.expert_bytes) + 1
    if plan.cache_tier.on_host:
        return whole._replace(moving_experts=moving)
    tokens = max(plan.tokens_per_pass, plan.prefill_chunk)
    attention = attention_bytes(config, rows, tokens, positions, DTYPE_BYTES[plan.dtype])
    return whole._replace(moving_experts=moving, activation_bytes=whole.activation_bytes + attention)


def cache_positions(longest: int, plan: Plan) -> int:
    """S: KV positions per row for sequences of `longest` tokens plus the rows a draft may overshoot.

    In steps of a page or, where that is more, eight between a power of two and the next, so that similar jobs share compiled
    programs and at most an eighth is never filled.
    """
    needed = longest + plan.lookahead
    step = max(KV_PAGE, 1 << (needed - 1).bit_length() >> 4)
    return -(-needed // step) * step


def pinned_experts(config: ModelConfig, plan: Plan) -> tuple[int, ...]:
    """[L], experts of each layer that stay on the accelerator between passes."""
    if plan.flow.all_resident:
        return (config.num_experts,) * config.num_moe_layers
    pinned = plan.drafting.pinned_experts(plan)
    return pinned if isinstance(pinned, tuple) else (pinned,) * config.num_moe_layers


def _spare_slots(plan: Plan, dispatch: int) -> int:
    if plan.prefetch != "draft":
        return plan.spare_slots or 0
    return dispatch if plan.spare_slots is None else plan.spare_slots
