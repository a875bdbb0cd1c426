"""The largest batch and context of a plan that fit, and the nearest plan that fits if this one does not. Pure."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.planner.estimate import needed, running_rows
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import BudgetError, PlanError
from specmoe_jax.support.units import GIB

MOST_ROWS = 1 << 16


class Memories(NamedTuple):
    """The fields of a machine that decide whether a plan fits; a Hardware has the same."""

    accelerator_memory_bytes: float
    host_memory_bytes: float
    accelerator_is_cpu: bool
    devices: int = MOST_ROWS  # more than any machine has: the engine looks at its own


class Nearest(NamedTuple):
    """plan: one that fits. changes: its differences from the first plan, as field=value."""

    plan: Plan
    changes: tuple[str, ...]


def refusal(config: ModelConfig, plan: Plan, hardware: Hardware | Memories, workload: Workload) -> str | None:
    """Why a plan cannot run, with the resource and the shortage; None where it fits with all of its batch at a time."""
    try:
        own = needed(config, plan.validate(config), hardware, workload)
    except PlanError as e:
        return str(e)
    rows = running_rows(plan, own, workload)
    if rows < plan.batch_size:
        return (
            f"host memory holds the KV cache of {rows} of {plan.batch_size} requests at a time; the others would wait: "
            f"give batch_size={rows} or {(plan.batch_size - rows) * own.kv_bytes / max(rows, 1) / GIB:.1f} GiB more"
        )
    return None


class Fitting(NamedTuple):
    """rows: the largest batch at the context that was asked for; where none fits, the smallest, of at most `tokens` a sequence."""

    rows: int
    tokens: int | None = None


def accounted(config: ModelConfig, plan: Plan, **job) -> MemoryAccount:
    """`memory.account`, whose arguments it takes; a refusal says too what batch and context would fit. Raises PlanError."""
    try:
        return account(config, plan, **job)
    except BudgetError as e:
        raise BudgetError(f"{e}; {_advice(what_fits(config, plan, **job))}") from None


def what_fits(
    config: ModelConfig, plan: Plan, *, batch_rows: int, positions: int, paged: PagedLoad | None = None, **job
) -> Fitting | None:
    """What of a job that is refused would fit; None: not even the smallest batch of one token a sequence."""
    unit = _unit(plan) if batch_rows >= _unit(plan) else plan.micro_batches

    def fits(rows: int, positions: int, load: PagedLoad | None) -> bool:
        try:
            own = account(config, plan, batch_rows=rows, positions=positions, paged=load, **job)
        except BudgetError:
            return False
        return load is None or own.kv_pages >= load.pages

    def share(rows: int) -> PagedLoad | None:
        return paged and PagedLoad(*(-(-whole * rows // batch_rows) for whole in paged))

    def short(tokens: int) -> bool:
        places = cache_positions(tokens, plan)
        return fits(unit, places, paged and PagedLoad(pages=unit * pages_of(places), prompt_tokens=unit * tokens))

    units = _most(lambda count: fits(count * unit, positions, share(count * unit)), -(-batch_rows // unit))
    if units:
        return Fitting(rows=units * unit)
    tokens = _most(short, positions)
    return Fitting(rows=unit, tokens=tokens) if tokens else None


def _most(works: Callable[[int], bool], limit: int) -> int:
    """The largest number up to a limit that works, where each below one that works does too; 0 where none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _advice(found: Fitting | None) -> str:
    if found is None:
        return "with this budget not even the shortest request fits"
    if found.tokens is None:
        return f"the largest batch that fits at this context is batch_size={found.rows}"
    return f"no batch fits at this context: the longest context that fits is {found.tokens} tokens, of batch_size={found.rows}"


def largest_batch(config: ModelConfig, plan: Plan, hardware: Hardware | Memories, workload: Workload) -> int:
    """Requests that generate together at most, a multiple of the plan's micro-batches; 0 where even the smallest batch fails.

    Of several devices that divide the rows a multiple of their number, if so many fit.
    """

    def most(unit: int) -> int:
        def fits(units: int) -> bool:
            return refusal(config, plan.replace(batch_size=units * unit), hardware, workload) is None

        high = 1
        while high * unit <= MOST_ROWS and fits(high):
            high *= 2
        return _most(fits, high - 1) * unit

    return most(_unit(plan)) or most(plan.micro_batches)


def _unit(plan: Plan) -> int:
    """Rows of the smallest batch that every device has its share of."""
    return plan.micro_batches if plan.cache_tier.on_host else plan.micro_batches * plan.devices


def nearest(config: ModelConfig, plan: Plan, hardware: Hardware | Memories, workload: Workload) -> Nearest | None:
    """The plan of fewest changes that fits: first another batch, then one, two, three of the moves below. None where none does."""
    moves = [move for move in _moves(config, plan, hardware) if move]
    for count in range(len(moves) + 1):
        for chosen in itertools.combinations(moves, count):
            changed = plan.replace(**{name: value for move in chosen for name, value in move.items()})
            rows = 0 if _is_wrong(changed, config) else largest_batch(config, changed, hardware, workload)
            if rows:
                found = changed.replace(batch_size=min(rows, plan.batch_size))
                return Nearest(found, _changes(plan, found, config))
    return None


def with_nearest(refused: str, found: Nearest | None, *, where: str = "") -> str:
    """A refusal and the plan to take instead. where: the machine that it fits."""
    if found is None:
        return f"{refused}; no plan near this one fits{where}"
    return f"{refused}; the nearest that fits{where}: {' '.join(found.changes)}"


def _moves(config: ModelConfig, plan: Plan, hardware: Hardware | Memories) -> list[dict]:
    """From what costs least to what costs most."""
    on_demand = _on_demand(config)
    return [
        {"pinned_layers": 0} if plan.pinned_layers else {},
        {"dtype": "bfloat16"} if plan.dtype == "float32" else {},
        plan.drafting.smaller(config),
        on_demand if any(getattr(plan, name) != value for name, value in on_demand.items() if name != "preset") else {},
        {} if plan.cache_tier.on_host else {"kv_tier": "host"},
        {"expert_tier": "disk", "host_memory_bytes": plan.host_memory_bytes or int(hardware.host_memory_bytes)}
        if plan.expert_tier == "host"
        else {},
    ]


def _on_demand(config: ModelConfig) -> dict:
    """What makes a plan the plainest one: nothing kept, nothing drafted, the cache on the accelerator."""
    plain = PRESETS["on_demand"](config)
    kept = ("dtype", "batch_size", "device_memory_bytes", "host_memory_bytes", "expert_tier", "dram_policy", "bypass_page_cache")
    return {
        field.name: getattr(plain, field.name)
        for field in dataclasses.fields(Plan)
        if field.name not in (*kept, "link_bytes_per_s", "prefill_chunk", "deterministic_sampling")
    }


def _is_wrong(plan: Plan, config: ModelConfig) -> bool:
    try:
        plan.validate(config)
    except PlanError:
        return True
    return False


def _changes(before: Plan, after: Plan, config: ModelConfig) -> tuple[str, ...]:
    """The fields that differ, without those that a new preset sets itself."""
    names = [field.name for field in dataclasses.fields(Plan) if getattr(before, field.name) != getattr(after, field.name)]
    if "preset" in names:
        own = PRESETS[after.preset](config)
        names = [name for name in names if name == "preset" or getattr(after, name) != getattr(own, name)]
    values = {name: getattr(after, name) for name in names}
    host = {name: values.pop(name) for name in ("host_memory_bytes",) if name in values}
    return tuple(f"{name}={value:.0f}" if name in host else f"{name}={value}" for name, value in (values | host).items())
