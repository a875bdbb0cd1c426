"""An account brought within the budgets of its plan: split draft caches, fewer pages and slots, or a refusal."""

import math

from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.planner.memory.memory_account import MemoryAccount
from specmoe_jax.support.errors import BudgetError, PlanError
from specmoe_jax.support.units import size_text


def split_draft(whole: MemoryAccount, plan: Plan, page_bytes: int) -> MemoryAccount:
    """With as much of a streamed plan's draft cache on the accelerator as may be there (SpecMoEOff 4), and room for the rest."""
    if not plan.drafting.splits_cache or not whole.kv_pages or not page_bytes:
        return whole
    room = whole.draft_kv_bytes
    if plan.draft_kv_bytes is not None:
        if plan.draft_kv_bytes < page_bytes:
            raise PlanError(
                f"draft_kv_bytes is {plan.draft_kv_bytes}, less than one page of the draft's cache, {size_text(page_bytes)}; the "
                f"smallest that works is draft_kv_bytes={math.ceil(page_bytes)}"
            )
        room = min(room, plan.draft_kv_bytes)
    if plan.device_memory_bytes is not None:
        room = min(room, plan.device_memory_bytes - (whole.accelerator_bytes - whole.draft_kv_bytes))
    if room >= whole.draft_kv_bytes:
        return whole
    pages = max(int(room // page_bytes), 1)  # where there is no room for one page the device's own refusal says so
    return whole._replace(draft_pages=pages, draft_kv_bytes=pages * page_bytes, host_draft_bytes=whole.kv_pages * page_bytes)


def fit_pages(whole: MemoryAccount, plan: Plan, positions: int) -> MemoryAccount:
    """With as many pages as host memory leaves, at least those of the longest request; the prompts' hidden states shrink alike."""
    paged = whole.host_bytes - whole.host_expert_bytes
    # A disk tier caches in what the pages leave, one expert at least.
    beside = whole.slot_bytes if plan.expert_tier == "disk" else whole.host_expert_bytes
    if not whole.kv_pages or plan.host_memory_bytes is None or beside + paged <= plan.host_memory_bytes:
        return whole
    page = paged / whole.kv_pages
    pages, one = int((plan.host_memory_bytes - beside) // page), pages_of(positions)
    if pages < one:
        raise BudgetError(
            f"host memory of {size_text(plan.host_memory_bytes)} is too small: experts take {size_text(beside)} and one request of "
            f"{positions} positions {size_text(one * page)}, {_short(beside + one * page, plan.host_memory_bytes)}; the "
            f"smallest that works is host_memory_bytes={math.ceil(beside + one * page)}"
        )
    share = pages / whole.kv_pages
    return whole._replace(
        kv_pages=pages,
        kv_bytes=whole.kv_bytes // whole.kv_pages * pages,
        hidden_bytes=int(whole.hidden_bytes * share),
        host_draft_bytes=whole.host_draft_bytes // whole.kv_pages * pages,
    )


def fit_host(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    """With as many experts in host memory as its budget lets a disk tier cache."""
    if plan.host_memory_bytes is None or whole.host_bytes <= plan.host_memory_bytes:
        return whole
    beside = whole.host_bytes - whole.host_expert_bytes
    if plan.expert_tier == "host":
        raise BudgetError(
            f"host memory of {size_text(plan.host_memory_bytes)} is too small: experts and KV cache need "
            f"{size_text(whole.host_bytes)}, {_short(whole.host_bytes, plan.host_memory_bytes)}; give "
            f"host_memory_bytes={math.ceil(whole.host_bytes)} or a smaller batch, or leave experts on disk: expert_tier=disk"
        )
    cached = int(plan.host_memory_bytes - beside) // whole.slot_bytes
    if cached < 1:
        need = beside + whole.slot_bytes
        raise BudgetError(
            f"host memory of {size_text(plan.host_memory_bytes)} is too small to cache one expert of the disk tier"
            f"{' beside the KV cache' if beside else ''}, {_short(need, plan.host_memory_bytes)}; the smallest that works is "
            f"host_memory_bytes={math.ceil(need)}"
        )
    return whole._replace(host_experts=cached)


def fit_device(whole: MemoryAccount, plan: Plan) -> MemoryAccount:
    """With as many expert slots as the device's budget leaves."""
    if plan.device_memory_bytes is None:
        return whole
    beside = whole.accelerator_bytes - whole.num_slots * whole.slot_bytes
    slots = int(plan.device_memory_bytes - beside) // whole.slot_bytes
    smallest = plan.flow.smallest_slots(whole)
    if slots < smallest:
        need = beside + smallest * whole.slot_bytes
        raise BudgetError(
            f"device memory of {size_text(plan.device_memory_bytes)} is too small for {plan.flow.what_needs_slots(plan)}: weights, "
            f"KV cache and activations take {size_text(beside)}, {smallest} expert slots "
            f"{size_text(smallest * whole.slot_bytes)}, "
            f"{_short(need, plan.device_memory_bytes)}; the smallest that works is device_memory_bytes={math.ceil(need)}"
            + (", or fewer draft experts" if plan.draft_experts else "")
            + (", or fewer pinned layers" if plan.pinned_layers else "")
        )
    return whole._replace(num_slots=min(slots, whole.num_slots))


def _short(need: float, budget: float) -> str:
    """The shortage."""
    return f"{size_text(need - budget)} short"
