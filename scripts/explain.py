"""What a checkpoint will do on a machine: memory, batch, speed, what binds. Reads config.json and headers, never a weight.

Examples:
    python scripts/explain.py --model=DIR --hardware=a30 --preset=specmoeoff --batch_size=64
    python scripts/explain.py --model=DIR --hardware=h100 --simulate      (every preset beside each other, and cache policies)
"""

import json
import pathlib
import time

import _common
import numpy as np
from absl import flags

from specmoe_jax.checkpoints.files import INDEX_FILE, SINGLE_FILE, open_checkpoint
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.config import (
    DRAFTS,
    DTYPES,
    EXPERT_DTYPES,
    EXPERT_TIERS,
    GIB,
    KV_TIERS,
    PREFETCHES,
    PRESETS,
    ModelConfig,
    Plan,
    preset,
)
from specmoe_jax.errors import PlanError, UserError
from specmoe_jax.planner import explain, pictures
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.machines import KNOWN, machine
from specmoe_jax.planner.probe import probe
from specmoe_jax.planner.roofline import points
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload

_MODEL = flags.DEFINE_string("model", "demo", '"demo" or a directory with config.json; headers are read where there are files.')
_HARDWARE = flags.DEFINE_string(
    "hardware",
    "this",
    f"this (probed once, then kept), one of {', '.join(KNOWN)} (data sheets), or a JSON file of Hardware.to_json.",
)
_PRESET = flags.DEFINE_enum("preset", "specmoe", list(PRESETS), "The plan to explain.")
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DRAFT = flags.DEFINE_enum("draft", None, [d for d in DRAFTS if d != "custom"], "Overrides the plan's draft.")
_DRAFT_LENGTH = flags.DEFINE_integer("draft_length", None, "Tokens drafted per step.")
_DRAFT_EXPERTS = flags.DEFINE_integer("draft_experts", None, "Draft experts per layer.")
_TREE_TOP_K = flags.DEFINE_integer("draft_tree_top_k", None, "Branches of a drafted node (draft=eagle).")
_TREE_TOKENS = flags.DEFINE_integer("draft_tree_tokens", None, "Nodes of the tree to verify; draft_length is its depth.")
_DRAFT_KV_GIB = flags.DEFINE_float("draft_kv_gib", None, "Accelerator memory of an EAGLE draft's cache (streamed plans).")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Requests that generate together.")
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", None, "Parts of a batch in flight at once.")
_PINNED_LAYERS = flags.DEFINE_integer(
    "pinned_layers",
    None,
    "Layers whose experts never cross again (streamed plans); default: what --device_memory_gib has room for.",
)
_KV_TIER = flags.DEFINE_enum("kv_tier", None, KV_TIERS, "Where the KV cache is.")
_EXPERT_TIER = flags.DEFINE_enum("expert_tier", None, EXPERT_TIERS, "Where all experts are.")
_PREFETCH = flags.DEFINE_enum("prefetch", None, PREFETCHES, "What is fetched on a guess.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Compute and weight type.")
_EXPERT_DTYPE = flags.DEFINE_enum("expert_dtype", None, EXPERT_DTYPES, "Quantised experts.")
_DEVICE_GIB = flags.DEFINE_float("device_memory_gib", None, "Accelerator memory to use. Default: what the machine has.")
_HOST_GIB = flags.DEFINE_float("host_memory_gib", None, "Host memory to use. Default: what the machine has.")
_LINK_GBPS = flags.DEFINE_float("link_gbps", None, "Emulate a link of that many GB/s.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Tokens of a prompt, on average.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens of a request.")
_ACCEPTANCE = flags.DEFINE_string("acceptance", "0.7", "Probability of a drafted token, or eagle_mixtral: the paper's map.")
_SKEW = flags.DEFINE_float(
    "skew", 0.3, "Gini coefficient of the expert counts: 0 all alike; NLLB-MoE 0.84, Mixtral 0.32, Scout 0.59."
)
_ROOFLINE = flags.DEFINE_string("roofline", None, "Where the roofline picture goes, .png (needs matplotlib).")
_GANTT = flags.DEFINE_string("gantt", None, "Where the picture of a simulated pass goes, .png (streamed plans).")
_SIMULATE = flags.DEFINE_boolean("simulate", False, "Every preset beside each other, and cache policies on a routing trace.")
_TRACE = flags.DEFINE_string("trace", None, "A routing trace, .npy of [passes, layers, experts] counts. Default: a synthetic one.")
_CAPACITY = flags.DEFINE_integer("cache_experts", None, "Experts that --simulate's cache policies keep. Default: a quarter of all.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON document instead of tables.")


def main() -> None:
    hardware = read_hardware(_HARDWARE.value)
    started_s = time.process_time()
    folder = checkpoint_path(_MODEL.value)
    config, workload = load_config(folder), make_workload()
    stored_bytes = read_stored_bytes(folder)
    if _SIMULATE.value:
        shown = explain.presets(config, make_plans(config), hardware, workload)
        shown |= explain.caches(config, workload, read_trace(), _CAPACITY.value, tokens=_BATCH_SIZE.value or 16)
    else:
        plan = make_plan(config)
        if problem := explain.problem(config, plan, hardware, workload):
            raise PlanError(problem)
        shown = explain.explain(config, plan, hardware, workload, stored_bytes=stored_bytes)
        save_pictures(config, plan, hardware, workload)
    shown |= {"assumptions": explain.assumptions(hardware, workload), "cpu_s": round(time.process_time() - started_s, 3)}
    print(json.dumps(shown, indent=2) if _JSON.value else explain.as_text(shown))


def read_hardware(name: str) -> Hardware:
    """This machine, a known one, or a JSON file."""
    if name == "this":
        return probe()
    if name in KNOWN or not pathlib.Path(name).suffix:
        return machine(name)
    try:
        return Hardware.from_json(pathlib.Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the hardware {name} ({e}); known are {', '.join(KNOWN)}") from e


def make_workload() -> Workload:
    """The flags as a workload; an encoder reads the prompt where there is one."""
    try:
        acceptance = EAGLE_MIXTRAL if _ACCEPTANCE.value == "eagle_mixtral" else float(_ACCEPTANCE.value)
    except ValueError:
        _common.usage_error(f"acceptance is {_ACCEPTANCE.value!r}; it is a probability or eagle_mixtral")
    return Workload(
        prompt_tokens=_PROMPT_TOKENS.value,
        source_tokens=_PROMPT_TOKENS.value,
        new_tokens=_MAX_NEW_TOKENS.value,
        acceptance=acceptance,
        skew=_SKEW.value,
    )


def read_stored_bytes(folder: pathlib.Path) -> int | None:
    """Bytes of the tensors, from checked headers; None for config.json alone. A load then matches them with the config."""
    if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    return sum(tensor.entry.bytes for tensor in open_checkpoint(folder).tensors.values())


def make_plan(config: ModelConfig) -> Plan:
    """The plan of --plan or --preset with the flags over it."""
    if _PLAN.value is None:
        return with_flags(preset(_PRESET.value, config).replace(dtype=_DTYPE.value))
    try:
        return with_flags(Plan.from_json(pathlib.Path(_PLAN.value).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the plan {_PLAN.value} ({e}); write one with Plan.to_json") from e


def make_plans(config: ModelConfig) -> dict[str, Plan]:
    """Every preset that can be planned without an emulated link, with batch, type and budgets of the flags."""
    shared = {"dtype": _DTYPE.value, **memory(), **({"batch_size": _BATCH_SIZE.value} if _BATCH_SIZE.value else {})}
    emulated = {"overlap"} if _LINK_GBPS.value is None else set()
    link = {} if _LINK_GBPS.value is None else {"link_bytes_per_s": _LINK_GBPS.value * 1e9}
    plans = {}
    for name in PRESETS:
        plan = preset(name, config).replace(**shared)
        plan = plan if plan.expert_flow == "resident" else plan.replace(**link)
        if plan.draft != "none" and _DRAFT_LENGTH.value is not None:
            plan = plan.replace(draft_length=_DRAFT_LENGTH.value)
        if name not in emulated:
            plans[name] = plan
    return plans


def memory() -> dict:
    """Budgets of the flags, in bytes."""
    given = {"device_memory_bytes": _DEVICE_GIB.value, "host_memory_bytes": _HOST_GIB.value}
    return {name: int(value * GIB) for name, value in given.items() if value is not None}


def with_flags(plan: Plan) -> Plan:
    """The plan with the choices that are given as flags."""
    chosen = (_DRAFT, _DRAFT_LENGTH, _DRAFT_EXPERTS, _TREE_TOP_K, _TREE_TOKENS, _BATCH_SIZE, _MICRO_BATCHES, _KV_TIER, _EXPERT_TIER)
    chosen = (*chosen, _EXPERT_DTYPE, _PREFETCH, _PINNED_LAYERS)
    given = {flag.name: flag.value for flag in chosen if flag.value is not None} | memory()
    if _DRAFT_KV_GIB.value is not None:
        given["draft_kv_bytes"] = _DRAFT_KV_GIB.value * GIB
    if _LINK_GBPS.value is not None:
        given["link_bytes_per_s"] = _LINK_GBPS.value * 1e9
    if _DRAFT.value not in (None, "self", "merged"):
        plan = plan.replace(draft_experts=None, draft_set=None, substitution=None)
    return (plan.replace(draft_length=None) if _DRAFT.value == "none" else plan).replace(**given)


def read_trace() -> np.ndarray | None:
    if _TRACE.value is None:
        return None
    try:
        return np.load(_TRACE.value, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise PlanError(f"cannot read the trace {_TRACE.value} ({e}); np.save counts [passes, layers, experts]") from e


def save_pictures(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload) -> None:
    """Those that were asked for."""
    title = f"{config.family}, {plan.preset}, batch {plan.batch_size}, on {hardware.name}"
    try:
        if _ROOFLINE.value:
            load = Load(plan.batch_size, plan.tokens_per_pass, workload.context)
            pictures.save_roofline(points(config, plan, hardware, load, skew=workload.skew), title, pathlib.Path(_ROOFLINE.value))
        if _GANTT.value:
            simulation = predict(config, plan, hardware, workload, interval=False).simulation
            if simulation is None:
                raise PlanError(f"--gantt shows a streamed pass; preset {plan.preset} has none: use streaming or specmoeoff")
            pictures.save_gantt(simulation, title, pathlib.Path(_GANTT.value))
    except ImportError as e:
        raise UserError(f"pictures need matplotlib ({e}): pip install specmoe_jax[plot]") from e


if __name__ == "__main__":
    _common.run(main)
