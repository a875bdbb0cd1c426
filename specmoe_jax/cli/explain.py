"""Predicts a checkpoint on a machine: memory, batch, speed, bottleneck. Reads config.json and headers, never a weight.

Examples:
    specmoe explain --model=DIR --hardware=a30 --preset=specmoeoff --batch_size=64
    specmoe explain --model=DIR --hardware=h100 --simulate      (every preset beside each other, and cache policies)
"""

import json
import pathlib
import time

import numpy as np
from absl import flags

from specmoe_jax.autotune.probe import probe
from specmoe_jax.checkpoints.files import INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.published.advice import check_form
from specmoe_jax.checkpoints.published.quantisation import Quantisation, as_stored, is_built, read_quantisation, stored_bytes
from specmoe_jax.cli import common, plan_flags
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.planner import explain, pictures
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.machines import KNOWN, machine
from specmoe_jax.planner.roofline import points
from specmoe_jax.planner.routing import choice_probabilities
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.support.errors import PlanError, UserError

_MODEL = flags.DEFINE_string("model", "demo", '"demo" or a directory with config.json; headers are read where there are files.')
_HARDWARE = flags.DEFINE_string(
    "hardware",
    "this",
    f"this (probed once, then kept), one of {', '.join(KNOWN)} (data sheets), or a JSON file of Hardware.to_json.",
)
_PRESET = flags.DEFINE_enum("preset", "specmoe", list(PRESETS), "The plan to explain.")
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Compute and weight type.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Tokens of a prompt, on average.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens of a request.")
_ACCEPTANCE = flags.DEFINE_string("acceptance", "0.7", "Probability of a drafted token, or eagle_mixtral: the paper's map.")
_SKEW = flags.DEFINE_float(
    "skew",
    None,
    "Gini coefficient of the expert counts: 0 all alike; NLLB-MoE 0.84, Mixtral 0.32, Scout 0.59. Default: 0.4, or less where a "
    "token takes most of the experts.",
)
_ROOFLINE = flags.DEFINE_string("roofline", None, "Where the roofline picture goes, .png (needs matplotlib).")
_GANTT = flags.DEFINE_string("gantt", None, "Where the picture of a simulated pass goes, .png (streamed plans).")
_SIMULATE = flags.DEFINE_boolean("simulate", False, "Every preset beside each other, and cache policies on a routing trace.")
_TRACE = flags.DEFINE_string(
    "trace", None, "With --simulate: a routing trace, .npy of counts [passes, layers, experts]. Default: synthetic."
)
_CAPACITY = flags.DEFINE_integer("cache_experts", None, "With --simulate: experts that a policy keeps. Default: a quarter of all.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON document instead of tables.")
flags.adopt_module_key_flags(plan_flags)


def main() -> None:
    check_flags()
    hardware = read_hardware(_HARDWARE.value)
    started_s = time.process_time()
    folder = checkpoint_path(_MODEL.value)
    check_form(folder, torch_files=True)
    config = load_config(folder)
    workload = make_workload(config)
    checkpoint = read_headers(folder)
    quantisation = read_quantisation(folder, checkpoint)
    config = as_stored(folder, config, checkpoint)
    on_disk = stored_bytes(folder, config, quantisation) if checkpoint is None else checkpoint.bytes
    if _SIMULATE.value:
        shown = explain.presets(config, make_plans(config), hardware, workload)
        shown |= explain.caches(config, workload, read_trace(), _CAPACITY.value, tokens=plan_flags.value("batch_size") or 16)
    else:
        plan = make_plan(config)
        if problem := explain.problem(config, plan, hardware, workload):
            raise PlanError(problem)
        shown = explain.explain(config, plan, hardware, workload, stored_bytes=on_disk)
        save_pictures(config, plan, hardware, workload)
    if quantisation is not None:
        shown |= {"weights": form_of(quantisation, config)}
    shown |= {"assumptions": explain.assumptions(config, hardware, workload), "cpu_s": round(time.process_time() - started_s, 3)}
    print(json.dumps(shown, indent=2) if _JSON.value else explain.as_text(shown))


def check_flags() -> None:
    """Refuses pictures without a plan, and simulation settings without a simulation."""
    if _SIMULATE.value:
        idle, advice = (_ROOFLINE, _GANTT), "with --simulate; leave it out"
    else:
        idle, advice = (_TRACE, _CAPACITY), "without --simulate; give both"
    for flag in idle:
        if flag.value is not None:
            common.usage_error(f"--{flag.name} has no effect {advice}")


def read_hardware(name: str) -> Hardware:
    """This machine, a known one, or a JSON file."""
    if name == "this":
        return probe(progress=True)
    if name in KNOWN or not pathlib.Path(name).suffix:
        return machine(name)
    try:
        return Hardware.from_json(pathlib.Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the hardware {name} ({e}); known are {', '.join(KNOWN)}") from e


def make_workload(config: ModelConfig) -> Workload:
    """The flags as a workload; an encoder reads the prompt where there is one. Raises PlanError for a skew that cannot be."""
    try:
        acceptance = EAGLE_MIXTRAL if _ACCEPTANCE.value == "eagle_mixtral" else float(_ACCEPTANCE.value)
    except ValueError:
        common.usage_error(f"acceptance is {_ACCEPTANCE.value!r}; it is a probability or eagle_mixtral")
    workload = Workload(
        prompt_tokens=_PROMPT_TOKENS.value,
        source_tokens=_PROMPT_TOKENS.value,
        new_tokens=_MAX_NEW_TOKENS.value,
        acceptance=acceptance,
        skew=_SKEW.value,
    )
    choice_probabilities(config.num_experts, config.experts_per_token, workload.skew_of(config))
    return workload


def read_headers(folder: pathlib.Path) -> Checkpoint | None:
    """The checked headers of a directory; None for config.json alone. A load then matches them with the config."""
    if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    return open_checkpoint(folder)


def form_of(quantisation: Quantisation, config: ModelConfig) -> str:
    """How the weights are stored, and whether they can be loaded."""
    bits = "" if quantisation.bits is None else f", {quantisation.bits:.3g} bits a weight"
    loads = "whose experts stay packed" if is_built(quantisation, config) else "which this version does not load"
    return f"{quantisation.words}{bits}, {loads}"


def make_plan(config: ModelConfig) -> Plan:
    """The plan of --plan or --preset with the flags over it."""
    if _PLAN.value is None:
        return plan_flags.over(preset(_PRESET.value, config).replace(dtype=_DTYPE.value))
    return plan_flags.over(common.read_plan(_PLAN.value))


def make_plans(config: ModelConfig) -> dict[str, Plan]:
    """Every preset that can be planned without an emulated link, with batch, type and budgets of the flags."""
    link = {name: value for name, value in plan_flags.given().items() if name == "link_bytes_per_s"}
    rows = {"batch_size": plan_flags.value("batch_size")} if plan_flags.value("batch_size") else {}
    shared = {"dtype": _DTYPE.value, **plan_flags.budgets(), **rows}
    emulated = set() if link else {"overlap"}
    plans = {}
    for name in PRESETS:
        plan = preset(name, config).replace(**shared)
        plan = plan if plan.flow.all_resident else plan.replace(**link)
        if plan.drafting.drafts and plan_flags.value("draft_length") is not None:
            plan = plan.replace(draft_length=plan_flags.value("draft_length"))
        if name not in emulated:
            plans[name] = plan
    return plans


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
            pictures.save_roofline(
                points(config, plan, hardware, load, skew=workload.skew_of(config)), title, pathlib.Path(_ROOFLINE.value)
            )
        if _GANTT.value:
            simulation = predict(config, plan, hardware, workload, interval=False).simulation
            if simulation is None:
                raise PlanError(f"--gantt shows a streamed pass; preset {plan.preset} has none: use streaming or specmoeoff")
            pictures.save_gantt(simulation, title, pathlib.Path(_GANTT.value))
    except ImportError as e:
        raise UserError(f"pictures need matplotlib ({e}): pip install specmoe_jax[plot]") from e
