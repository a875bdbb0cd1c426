"""Recommends a plan for a checkpoint on a machine, or predicts one. Reads config.json and headers, never a weight.

Examples:
    specmoe explain --model=DIR --hardware=4090                  (the best plan, the next one, what is left unused)
    specmoe explain --model=DIR --hardware=a30 --preset=specmoeoff --batch_size=64
    specmoe explain --model=DIR --hardware=h100 --simulate       (every preset beside each other, and cache policies)
"""

import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import flags

from specmoe_jax.autotune.advice import Advised, advise, searches
from specmoe_jax.autotune.calibrate import cached_calibration
from specmoe_jax.autotune.choose import REQUESTS, Knowledge
from specmoe_jax.autotune.profile import cached_profile
from specmoe_jax.checkpoints.eagle import head_config
from specmoe_jax.checkpoints.files import GGUF_TABLE, INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from specmoe_jax.checkpoints.loader import checkpoint_path, is_mapped, load_config
from specmoe_jax.checkpoints.published.advice import check_form
from specmoe_jax.checkpoints.published.quantisation import as_stored, read_quantisation, stored_bytes
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import machine_flag, plan_flags
from specmoe_jax.cli.shown import explain_text
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.jobs.routing_traces import read_counts
from specmoe_jax.planner import explain, pictures, replay
from specmoe_jax.planner.calibration import ASSUMED, Acceptance, Calibration
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.roofline import points
from specmoe_jax.planner.routing import choice_probabilities
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.support.errors import PlanError, UserError
from specmoe_jax.support.progress import bar

_MODEL = flags.DEFINE_string("model", "demo", '"demo" or a directory with config.json; headers are read where there are files.')
_HARDWARE = flags.DEFINE_string("hardware", machine_flag.THIS, machine_flag.HELP)
_PRESET = flags.DEFINE_enum("preset", None, ["auto", *PRESETS], "The plan to explain. Default: auto, the best ones.")
_REQUESTS = flags.DEFINE_integer(
    "requests", None, "Requests of the job that a plan is chosen for. Default: 1, and 64.", lower_bound=1
)
_DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head to draft with; without one none is recommended.")
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Compute and weight type.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Tokens of a prompt, on average.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens of a request.")
_ACCEPTANCE = flags.DEFINE_string(
    "acceptance",
    None,
    "Probability of a drafted token, or eagle_mixtral: the paper's map. Default: measured, or assumed of each draft.",
)
_SKEW = flags.DEFINE_float(
    "skew",
    None,
    "Gini coefficient of the expert counts: 0 all alike; NLLB-MoE 0.84, Mixtral 0.32, Scout 0.59. Default: 0.4, or less where a "
    "token takes most of the experts.",
)
_ROOFLINE = flags.DEFINE_string("roofline", None, "Where the roofline picture goes, .png (needs matplotlib).")
_GANTT = flags.DEFINE_string("gantt", None, "Where the picture of a simulated pass goes, .png (streamed plans).")
_SIMULATE = flags.DEFINE_boolean("simulate", False, "Every preset beside each other, and cache policies on a routing trace.")
_DEVICE_TABLE = flags.DEFINE_boolean(
    "device_table", False, "The plan on 1, 2, 4 and 8 accelerators, and on 8 hosts of them (--preset or --plan)."
)
_TRACE = flags.DEFINE_string(
    "trace",
    None,
    "With --simulate: what generate --routing_traces wrote, the folder or a file, or .npy of counts [passes, layers, experts]. "
    "Default: synthetic.",
)
_CAPACITY = flags.DEFINE_integer("cache_experts", None, "With --simulate: experts that a policy keeps. Default: a quarter of all.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON document instead of tables.")
flags.adopt_module_key_flags(plan_flags)


def main() -> None:
    check_flags()
    named = machine_flag.read_hardware(_HARDWARE.value)
    started_s = time.process_time()
    folder = checkpoint_path(_MODEL.value)
    check_form(folder, torch_files=True)
    config = load_config(folder)
    checkpoint = read_headers(folder)
    quantisation = read_quantisation(folder, checkpoint)
    config = as_stored(folder, config, checkpoint)
    known = know(named.hardware, config, folder if checkpoint is not None else None)
    on_disk = stored_bytes(folder, config, quantisation) if checkpoint is None else checkpoint.bytes
    if _SIMULATE.value:
        shown, said = simulated(config, known)
    else:
        shown, said = explained(config, known, on_disk)
    if quantisation is not None:
        shown |= {"weights": explain_text.form_of(quantisation, config)}
    said += explain.assumptions(config, known.hardware, known.workload) + ([named.said] if named.said else [])
    shown |= {"assumptions": said, "cpu_s": round(time.process_time() - started_s, 3)}
    print(json.dumps(shown, indent=2) if _JSON.value else explain_text.as_text(shown))


def is_auto() -> bool:
    """Whether plans are recommended, the default."""
    return _PLAN.value is None and (_PRESET.value or "auto") == "auto"


def know(hardware: Hardware, config: ModelConfig, folder: pathlib.Path | None) -> Knowledge:
    """The machine, the workload, and what was measured of this checkpoint and, of this machine, of its operators."""
    workload = make_workload(config)
    measured = (folder and cached_calibration(folder)) or ASSUMED
    own = _HARDWARE.value == machine_flag.THIS
    return Knowledge(
        hardware=machine_flag.with_budgets(hardware, plan_flags.budgets()),
        workload=workload,
        calibration=measured if _ACCEPTANCE.value is None else given_calibration(workload),
        operators=cached_profile(config, _DTYPE.value) if own and is_auto() else None,
        is_mapped=folder is not None and is_mapped(folder, _DTYPE.value),
    )


def given_calibration(workload: Workload) -> Calibration:
    """Every draft accepted as --acceptance says."""
    rate: Any = workload.acceptance  # maybe a map, as an assumed one
    return ASSUMED._replace(acceptance={name: Acceptance(rate) for name in DRAFTS})


def explained(config: ModelConfig, known: Knowledge, on_disk: int | None) -> tuple[dict, list[str]]:
    """The plan that was asked for, or the recommended ones and the last of them. -> what to show, what was assumed."""
    shown = {}
    if is_auto():
        advised = recommended(config, known)
        plan, shown = advised[-1].best.plan, {"advice": explain_text.advice(advised, config, known)}
    else:
        plan = make_plan(config)
    if _DRAFT_HEAD.value and plan.drafting.given != "draft_head":
        common.usage_error(f"--draft_head has no effect with draft={plan.drafting.name}; leave it out")
    workload = known.calibration.workload(known.workload, plan, config)
    if problem := explain.problem(config, plan, known.hardware, workload):
        raise PlanError(problem)
    shown |= explain.explain(config, plan, known.hardware, workload, stored_bytes=on_disk)
    if _DEVICE_TABLE.value:
        shown |= explain.devices(config, plan, known.hardware, workload)
    save_pictures(config, plan, known.hardware, workload)
    return shown, acceptance_of([plan], config, known)


def recommended(config: ModelConfig, known: Knowledge) -> list[Advised]:
    """For one request and for many, or for those of --requests. Raises PlanError that names what would fit."""
    fixed: dict[str, Any] = plan_flags.given() | {"dtype": _DTYPE.value} | ({"draft": "eagle"} if _DRAFT_HEAD.value else {})
    if "batch_size" in fixed and _REQUESTS.value is None:
        counts = [fixed["batch_size"]]
    else:
        counts = [_REQUESTS.value] if _REQUESTS.value else [1, REQUESTS]
    with bar("search", len(counts) * searches(fixed), "plan", mode="auto", leave=False) as shown:
        try:
            return [
                advise(config, known, requests=count, fixed=fixed, head=_DRAFT_HEAD.value is not None, progress=shown.update)
                for count in counts
            ]
        except PlanError:
            plainest = plan_flags.over(preset("specmoe", config).replace(dtype=_DTYPE.value))
            if problem := explain.problem(config, plainest, known.hardware, known.workload):
                raise PlanError(problem) from None
            raise


def simulated(config: ModelConfig, known: Knowledge) -> tuple[dict, list[str]]:
    """Every preset at one batch, and cache policies on a trace."""
    plans = make_plans(config)

    def workload(plan: Plan) -> Workload:
        return known.calibration.workload(known.workload, plan, config)

    with bar("simulate", len(plans) + len(replay.policies()), "run", mode="auto", leave=False) as progress:
        shown = explain.presets(config, plans, known.hardware, workload, progress=progress.update)
        shown |= explain.caches(
            config,
            known.workload,
            trace_of_flag(config),
            _CAPACITY.value,
            tokens=batch_of_simulation(),
            progress=progress.update,
        )
    return shown, acceptance_of(plans.values(), config, known)


def trace_of_flag(config: ModelConfig) -> np.ndarray | None:
    """Requests are decoded plainly, as many at a time as the presets' batch has rows."""
    return None if _TRACE.value is None else read_counts(pathlib.Path(_TRACE.value), config, batch_of_simulation())


def acceptance_of(plans: Iterable[Plan], config: ModelConfig, known: Knowledge) -> list[str]:
    """Where the acceptance of each draft comes from."""
    skew = known.workload.skew_of(config)
    found = ((plan, known.calibration.acceptance_of(plan, config, skew)) for plan in plans)
    said = [explain.acceptance(plan, accepted, has_head=_DRAFT_HEAD.value is not None) for plan, accepted in found]
    return [*dict.fromkeys(filter(None, said))]


def batch_of_simulation() -> int:
    """The batch of every preset."""
    return plan_flags.value("batch_size") or 16


def check_flags() -> None:
    """Refuses pictures without a plan, and settings of a simulation or a search without one."""
    if _SIMULATE.value:
        idle, advice = (_ROOFLINE, _GANTT, _REQUESTS), "with --simulate; leave it out"
    else:
        idle, advice = (_TRACE, _CAPACITY), "without --simulate; give both"
    if not is_auto():
        idle, advice = (*idle, _REQUESTS), advice if _SIMULATE.value else "with a plan or a preset; leave it out"
    if is_auto() and _DEVICE_TABLE.value:
        common.usage_error("--device_table is of one plan; give it with --preset or --plan")
    for flag in idle:
        if flag.value is not None:
            common.usage_error(f"--{flag.name} has no effect {advice}")


def make_workload(config: ModelConfig) -> Workload:
    """The flags as a workload; an encoder reads the prompt where there is one. Raises PlanError for a skew that cannot be."""
    try:
        acceptance = EAGLE_MIXTRAL if _ACCEPTANCE.value == "eagle_mixtral" else float(_ACCEPTANCE.value or 0.7)
    except ValueError:
        common.usage_error(f"acceptance is {_ACCEPTANCE.value!r}; it is a probability or eagle_mixtral")
    workload = Workload(
        prompt_tokens=_PROMPT_TOKENS.value,
        source_tokens=_PROMPT_TOKENS.value,
        new_tokens=_MAX_NEW_TOKENS.value,
        acceptance=acceptance,
        skew=_SKEW.value,
        head=head_config(_DRAFT_HEAD.value, config) if _DRAFT_HEAD.value else None,
    )
    choice_probabilities(config.num_experts, config.experts_per_token, workload.skew_of(config))
    return workload


def read_headers(folder: pathlib.Path) -> Checkpoint | None:
    """The checked headers of a directory; None for config.json alone. A load then matches them with the config."""
    if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE, GGUF_TABLE)):
        return None
    return open_checkpoint(folder)


def make_plan(config: ModelConfig) -> Plan:
    """The plan of --plan or --preset with the flags over it."""
    if _PLAN.value is None:
        return plan_flags.over(preset(_PRESET.value or "", config).replace(dtype=_DTYPE.value))
    return plan_flags.over(common.read_plan(_PLAN.value))


def make_plans(config: ModelConfig) -> dict[str, Plan]:
    """Every preset that can be planned without an emulated link, with type and budgets of the flags, all at one batch.

    One that needs a trained head is left out where there is none, unless an acceptance was given for it.
    """
    link = {name: value for name, value in plan_flags.given().items() if name == "link_bytes_per_s"}
    shared = {"dtype": _DTYPE.value, **plan_flags.budgets(), "batch_size": batch_of_simulation()}
    left_out = set() if link else {"overlap"}
    if _DRAFT_HEAD.value is None and _ACCEPTANCE.value is None:
        left_out |= {name for name in PRESETS if preset(name, config).drafting.given == "draft_head"}
    plans = {}
    for name in PRESETS:
        plan = preset(name, config).replace(**shared)
        plan = plan if plan.flow.all_resident else plan.replace(**link)
        if plan.drafting.drafts and plan_flags.value("draft_length") is not None:
            plan = plan.replace(draft_length=plan_flags.value("draft_length"))
        if name not in left_out:
            plans[name] = plan
    return plans


def save_pictures(config: ModelConfig, plan: Plan, hardware: Hardware, workload: Workload) -> None:
    """Those that were asked for."""
    title = f"{config.family}, {plan.preset}, batch {plan.batch_size}, on {hardware.name}"
    try:
        if _ROOFLINE.value:
            load = Load(plan.batch_size, plan.tokens_per_pass, workload.context)
            shown = points(config, plan, hardware, load, skew=workload.skew_of(config))
            pictures.save_roofline(shown, title, pathlib.Path(_ROOFLINE.value))
        if _GANTT.value:
            simulation = predict(config, plan, hardware, workload, interval=False).simulation
            if simulation is None:
                raise PlanError(f"--gantt shows a streamed pass; preset {plan.preset} has none: use streaming or specmoeoff")
            pictures.save_gantt(simulation, title, pathlib.Path(_GANTT.value))
    except ImportError as e:
        raise UserError(f"pictures need matplotlib ({e}): pip install specmoe_jax[plot]") from e
