"""The prediction of a plan on a machine: time, bytes, memory, bottleneck. Pure numbers; nothing is run, no weight is read."""

import dataclasses
import math
from typing import NamedTuple, Protocol

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.drafts.protocol import draft_costs
from specmoe_jax.planner.hardware import Efficiency, Hardware
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.planner.passes import Setting, Timing, time_pass
from specmoe_jax.planner.simulate import Simulation
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import PlanError

# Rates whose spread makes the interval: by what share the tokens/s move with each, added as independent errors are.
_UNCERTAIN = (
    "up_bytes_per_s",
    "accelerator_flops_float32",
    "accelerator_flops_bfloat16",
    "accelerator_bytes_per_s",
    "cpu_flops_float32",
    "cpu_flops_bfloat16",
    "dram_bytes_per_s",
    "disk_bytes_per_s",
)


class Memory(Protocol):
    """What of a machine decides whether a plan fits: of a Hardware, or of planner.memory.fit.Memories."""

    @property
    def accelerator_memory_bytes(self) -> float: ...

    @property
    def host_memory_bytes(self) -> float: ...

    @property
    def accelerator_is_cpu(self) -> bool: ...

    @property
    def devices(self) -> int: ...


class Prediction(NamedTuple):
    """Of the decoding in its steady state.

    rows: sequences that run at a time. interval: of tokens_per_s, None if not asked for. binding: the busiest resource.
    busy_s: of one iteration, by resource. floor_s: roofline bound of the pass at the machine's peaks.
    naive_s: the iteration by the per-layer maximum; None for passes that are not streamed. prefill_s: of all rows' prompts.
    slowest_row_factor: steps of the slowest row over those of a mean row, because a batch runs until its last row ends.
    """

    rows: int
    iteration_s: float
    draft_s: float
    tokens_per_step: float
    tokens_per_s: float
    interval: tuple[float, float] | None
    link_bytes_per_token: float
    binding: str
    busy_s: dict[str, float]
    floor_s: float
    prefill_s: float
    account: MemoryAccount
    naive_s: float | None
    simulation: Simulation | None
    slowest_row_factor: float = 1.0

    @property
    def fraction_of_floor(self) -> float:
        return self.floor_s / self.iteration_s


def predict(
    config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload, *, budgets: bool = True, interval: bool = True
) -> Prediction:
    """The prediction of a plan. budgets: the machine's memories limit what the plan does not; False: only the plan does.

    Raises PlanError for a plan that does not hold for the model or does not fit.
    """
    plan = plan.validate(config).resolved(accelerator_is_cpu=hardware.accelerator_is_cpu)
    if plan.devices > 1 and not hardware.peer_bytes_per_s:
        raise PlanError(f"devices={plan.devices} and {hardware.name} has no peer_bytes_per_s; give it in a machine file")
    own = needed(config, plan, hardware, workload, budgets=budgets)
    rows = running_rows(plan, own, workload)
    timing = _time(config, plan, hardware, workload, own, rows)
    tokens = workload.tokens_of(plan)
    setting = _setting(config, plan, hardware, workload, own, rows)
    return Prediction(
        rows=rows,
        iteration_s=timing.iteration_s,
        draft_s=timing.draft_s,
        tokens_per_step=tokens,
        tokens_per_s=rows * tokens / timing.iteration_s,
        interval=_interval(config, plan, hardware, workload, own, rows, timing, tokens) if interval else None,
        link_bytes_per_token=timing.link_bytes / (rows * tokens),
        binding=_binding(timing.busy_s, hardware),
        busy_s=timing.busy_s,
        floor_s=timing.floor_s,
        prefill_s=plan.flow.prefill_seconds(setting, workload.source_tokens if config.encoder else workload.prompt_tokens),
        account=own,
        naive_s=timing.simulation and timing.simulation.naive_s,
        simulation=timing.simulation,
        slowest_row_factor=workload.slowest_row_factor(plan, rows),
    )


def needed(config: ModelConfig, plan: Plan, hardware: Memory, workload: Workload, *, budgets: bool = True) -> MemoryAccount:
    """The engine's own account for this workload. Raises PlanError with the shortage."""
    plan = plan.resolved(accelerator_is_cpu=hardware.accelerator_is_cpu)
    if budgets and plan.devices > hardware.devices:
        raise PlanError(f"devices={plan.devices} and the machine has {hardware.devices}; give at most as many")
    if budgets:
        device, host = plan.device_memory_bytes, plan.host_memory_bytes
        plan = plan.flow.without_budget(plan) if device is None else plan
        plan = plan.replace(
            device_memory_bytes=int(hardware.accelerator_memory_bytes) if device is None else device,
            host_memory_bytes=int(hardware.host_memory_bytes) if host is None else host,
        )
    prompt, longest = _prompt(config, workload), _prompt(config, workload) + workload.new_tokens
    rows, positions = plan.batch_size, cache_positions(longest, plan)
    one = plan.flow.paged_load(plan, [(prompt, workload.new_tokens)], 1)
    return account(
        config,
        plan,
        batch_rows=rows,
        positions=positions,
        source_positions=workload.source_tokens if config.encoder else 0,
        draft=plan.drafting.memory(plan, config, head=workload.head, model=workload.draft_model),
        paged=one and PagedLoad(*(rows * amount for amount in one)),
        accelerator_is_cpu=hardware.accelerator_is_cpu,
    )


def running_rows(plan: Plan, own: MemoryAccount, workload: Workload) -> int:
    """Sequences at a time: the batch, or as many as have pages in a paged cache."""
    return plan.flow.running_rows(plan, own, workload.prompt_tokens + workload.new_tokens)


def _prompt(config: ModelConfig, workload: Workload) -> int:
    """Positions that the decoder's cache holds before it writes."""
    return len(config.encoder.start) if config.encoder else workload.prompt_tokens


def _setting(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload, own: MemoryAccount, rows: int) -> Setting:
    context = _prompt(config, workload) + workload.new_tokens / 2
    load = Load(rows, plan.tokens_per_pass, context, workload.source_tokens if config.encoder else 0)
    machine = _with_emulated_link(hardware if plan.devices == 1 else _with_shared_memory(hardware, plan.devices), plan)
    return Setting(config, plan, machine, own, load, workload.skew_of(config))


def _with_shared_memory(hardware: Hardware, devices: int) -> Hardware:
    """All links of a host together bring no more than its memory gives."""
    return hardware.replace(up_bytes_per_s=min(hardware.up_bytes_per_s, hardware.hosts * hardware.dram_bytes_per_s / devices))


def _with_emulated_link(hardware: Hardware, plan: Plan) -> Hardware:
    """Experts cross at the emulated rate; activations do not."""
    if plan.link_bytes_per_s is None:
        return hardware
    share = min(plan.link_bytes_per_s / hardware.up_bytes_per_s, 1.5)
    efficiencies = dict(hardware.efficiencies) | {"stream": Efficiency(memory=share)}
    return hardware.replace(efficiencies=tuple(efficiencies.items()))


def _time(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload, own: MemoryAccount, rows: int) -> Timing:
    setting = _setting(config, plan, hardware, workload, own, rows)
    share = _cpu_share(plan, own, setting.load)
    known = {"head": workload.head, "model": workload.draft_model, "cpu_share": share, "hosts": hardware.hosts}
    of_draft = draft_costs(plan, config, setting.load, skew=workload.skew_of(config), **known)
    return time_pass(setting, of_draft)


def _cpu_share(plan: Plan, own: MemoryAccount, load: Load) -> float:
    """Of the rows, those whose draft's cache has no room on the accelerator at the mean context."""
    if not own.draft_pages:
        return 0.0
    return max(1 - own.draft_pages / (load.rows * pages_of(math.ceil(load.context) + plan.lookahead)), 0.0)


def _binding(busy_s: dict[str, float], hardware: Hardware) -> str:
    if hardware.accelerator_is_cpu:
        busy_s = busy_s | {ACCELERATOR: busy_s[ACCELERATOR] + busy_s[CPU], CPU: 0.0}
    return max(busy_s, key=busy_s.__getitem__)


def _interval(config, plan, hardware, workload, own, rows, timing: Timing, tokens: float) -> tuple[float, float]:
    """Each rate lowered by its spread in turn; the changes of the iteration are added in quadrature, the same up and down."""
    changes = []
    for name in _UNCERTAIN:
        if name.endswith(("float32", "bfloat16")) and not name.endswith(plan.dtype):
            continue
        slower = dataclasses.replace(hardware, **{name: getattr(hardware, name) * (1 - min(hardware.spread(name), 0.9))})
        changes.append(_time(config, plan, slower, workload, own, rows).iteration_s / timing.iteration_s - 1)
    spread = math.hypot(*changes)
    rate = rows * tokens / timing.iteration_s
    return rate / (1 + spread), rate * (1 + spread)
