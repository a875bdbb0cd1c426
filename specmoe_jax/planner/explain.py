"""The output of `specmoe explain`. Pure: dictionaries with units in their names, and tables of them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner import replay, routing
from specmoe_jax.planner.calibration import Acceptance
from specmoe_jax.planner.estimate import Prediction, predict
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.memory import fit
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.units import GIB

DEVICE_COUNTS = (1, 2, 4, 8)
HOST_COUNTS = (2, 4, 8)  # of machines that reach each other
TRACE_PASSES = 64  # of a synthetic routing trace


def problem(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload) -> str | None:
    """Why the plan does not fit, and the nearest one that does; None where it fits."""
    plan.validate(config)
    refused = fit.refusal(config, plan, hardware, workload)
    if refused is None:
        return None
    other = fit.nearest(config, plan, hardware, workload)
    said = fit.with_nearest(refused, other, where=f" {hardware.name}")
    if other is not None:
        return said
    one = Plan(preset="on_demand", dtype=plan.dtype, batch_size=1)
    least = account(config, one, batch_rows=1, positions=64, accelerator_is_cpu=hardware.accelerator_is_cpu)
    alone_gib = (least.accelerator_bytes - (least.num_slots - 1) * least.slot_bytes) / GIB
    return f"{said}: one row and one expert alone take {alone_gib:.1f} GiB there"


def explain(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload, *, stored_bytes: int | None) -> dict[str, Any]:
    """Of a plan that fits. stored_bytes: what a load reads, None where there are no files."""
    found = predict(config, plan, hardware, workload)
    own = found.account
    return {
        "plan": plan.preset,
        "machine": hardware.name,
        **({"devices": plan.devices} if plan.devices > 1 else {}),  # the next is of each
        "accelerator_gib": {
            "weights": own.weight_bytes / GIB,
            "expert slots": ((own.num_slots + own.merged_slots) * own.slot_bytes - own.spare_expert_bytes) / GIB,
            "spare-expert cache": own.spare_expert_bytes / GIB,
            "experts on their way": own.moving_experts * own.slot_bytes / GIB,
            "KV cache": own.accelerator_kv_bytes / GIB,
            "recurrent states": own.state_bytes / GIB,
            "activations": own.activation_bytes / GIB,
            "staging of prompts": own.staging_bytes / GIB,
            "draft": own.draft_model_bytes / GIB,
            "draft's KV cache": own.draft_kv_bytes / GIB,
            "all": own.accelerator_bytes / GIB,
            "has": hardware.accelerator_memory_bytes / GIB,
        },
        "host_gib": {
            "experts, pinned": own.host_expert_bytes / GIB,
            "KV cache": own.host_kv_bytes / GIB,
            "draft's KV cache": own.host_draft_bytes / GIB,
            "hidden states of prompts": own.hidden_bytes / GIB,
            "all": own.host_bytes / GIB,
            "has": hardware.host_memory_bytes / GIB,
        },
        "disk_gib": None if stored_bytes is None else stored_bytes / GIB,
        "load_s": None if stored_bytes is None else stored_bytes / hardware.disk_bytes_per_s,
        "batch": plan.batch_size,
        "prefill_chunk": plan.prefill_chunk,
        "largest_batch": fit.largest_batch(config, plan, hardware, workload),
        **_speed(found),
    }


def _speed(found: Prediction) -> dict[str, Any]:
    return {
        "tokens_per_s": found.tokens_per_s,
        "tokens_per_s_interval": list(found.interval) if found.interval else None,
        "binding_resource": found.binding,
        "iteration_s": found.iteration_s,
        "draft_s": found.draft_s,
        "prefill_s": found.prefill_s,
        "naive_iteration_s": found.naive_s,
        "tokens_per_step": found.tokens_per_step,
        "link_bytes_per_token": found.link_bytes_per_token,
        "busy_s": {name: value for name, value in found.busy_s.items() if value},
        "floor_s": found.floor_s,
        "fraction_of_floor": found.fraction_of_floor,
    }


def presets(
    config: ModelConfig,
    plans: dict[str, Plan],
    hardware: Hardware,
    workload: Callable[[Plan], Workload],
    *,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """All plans side by side; for one that does not fit, the reason, and its prediction if it did.

    workload: of a plan, whose draft has an acceptance of its own. progress: called after each.
    """
    table = {}
    for name, plan in plans.items():
        try:
            found = predict(config, plan, hardware, workload(plan), budgets=False, interval=False)
        except PlanError as e:  # a budget of the plan itself
            table[name] = {"cannot run": str(e)}
            continue
        finally:
            progress()
        refused = fit.refusal(config, plan, hardware, workload(plan))
        speed = _speed(found)
        kept = ("tokens_per_s", "iteration_s", "draft_s", "tokens_per_step", "link_bytes_per_token", "binding_resource")
        table[name] = {"batch": plan.batch_size} | {key: speed[key] for key in kept} | {"fits": refused is None}
    base = table.get("on_demand", {}).get("link_bytes_per_token")
    for row in table.values():
        if base and "link_bytes_per_token" in row:
            row["bytes x on_demand"] = row["link_bytes_per_token"] / base
    return {"machine": hardware.name, "presets": table}


def devices(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload) -> dict[str, Any]:
    """A plan on so many accelerators alike: how speed and the memory of each grow, and what binds.

    Of a machine with a network, on so many of those, too.
    """
    table, first = {}, None
    several = tuple(hosts * hardware.devices for hosts in HOST_COUNTS) if hardware.network_bytes_per_s else ()
    for count in (*DEVICE_COUNTS, *several):
        machine = hardware.cluster(count) if several else hardware.replace(devices=count)
        own = plan.replace(devices=count)
        try:
            found = predict(config, own, machine, workload, interval=False)
        except PlanError as e:
            table[str(count)] = {"cannot run": str(e)}
            continue
        first = first or found.tokens_per_s
        table[str(count)] = {
            "tokens_per_s": found.tokens_per_s,
            "times": found.tokens_per_s / first,
            "iteration_s": found.iteration_s,
            "link_bytes_per_token": found.link_bytes_per_token / count,  # of one device's link, on average
            "accelerator_gib": found.account.accelerator_bytes / GIB,  # of one device
            **({"hosts": machine.hosts} if several else {}),
            "largest_batch": fit.largest_batch(config, own, machine, workload),
            "binding_resource": found.binding,
        }
    return {"devices": table}


def caches(
    config: ModelConfig,
    workload: Workload,
    trace: np.ndarray | None,
    capacity: int | None,
    *,
    tokens: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Fetches of each cache policy on a trace, over those of the optimum. tokens: of a pass of the synthetic one.

    progress: called after each policy.
    """
    p = routing.choice_probabilities(config.num_experts, config.experts_per_token, workload.skew_of(config))
    given = trace is not None
    if not given:
        layers = config.num_moe_layers
        trace = replay.synthetic_trace(p, config.experts_per_token, layers=layers, passes=TRACE_PASSES, tokens=tokens)
    kept: int = trace.shape[1] * trace.shape[2] // 4 if capacity is None else capacity
    fetched = replay.replay(trace, kept, progress=progress)
    needed = fetched.pop("needed")
    return {
        "cache": {
            "trace": "{}, {} passes, {} layers, {} experts".format("given" if given else "synthetic", *trace.shape),
            "experts_kept": kept,
            "experts_needed": needed,
        }
        | {f"fetched, {name}{', loaded before' * (name == 'static')}": count for name, count in fetched.items()}
    }


def assumptions(config: ModelConfig, hardware: Hardware, workload: Workload) -> list[str]:
    """The assumed inputs of a prediction, beside the acceptance of its draft."""
    found = [f"routing: independent tokens of skew {workload.skew_of(config):.3g}"]
    return found if hardware.measured else [f"machine: data sheets and assumed efficiencies ({hardware.name})", *found]


def acceptance(plan: Plan, known: Acceptance, *, has_head: bool) -> str | None:
    """Where the acceptance of a plan's draft comes from; None where it drafts nothing."""
    draft = plan.drafting
    if not draft.drafts:
        return None
    rate = f"{known.rate:.2g} a token" if isinstance(known.rate, float) else "that of the EAGLE head of SpecMoEOff's Mixtral"
    origin = "ASSUMED; specmoe plan --prompts=FILE measures it" if known.assumed else "given or measured"
    needs = "" if draft.given != "draft_head" or has_head else "; it needs a trained head (--draft_head), and none is given"
    return f"acceptance of draft={draft.name}: {rate}, {origin}{needs}"


def as_text(shown: dict[str, Any], indent: str = "") -> str:
    """An aligned line for each entry, nested ones under their name; entries of the same kind as a table."""
    width = max(map(len, shown), default=0)
    lines = []
    for name, value in shown.items():
        if isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values()):
            lines += [f"{indent}{name}:", _as_table(value, indent + "  ")]
        elif isinstance(value, dict):
            lines += [f"{indent}{name}:", as_text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {_shown(value)}")
    return "\n".join(lines)


def _as_table(rows: dict[str, dict[str, Any]], indent: str) -> str:
    """A line for each entry and a column for each of their names."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [["", *names], *([title, *(_shown(row[name]) if name in row else "" for name in names)] for title, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ("; " if value and isinstance(value[0], str) else " to ").join(map(_shown, value))
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
