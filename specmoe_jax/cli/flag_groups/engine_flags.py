"""The flags of commands that hold one engine for many requests, and the engine that they give (adopt_module_key_flags)."""

import functools
import pathlib
from typing import Any

from absl import flags

from specmoe_jax.autotune import choose as planning
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.eagle import bundled_head, load_head
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.checkpoints.mtp import load_planned_mtp
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import plan_flags
from specmoe_jax.cli.flag_groups.chosen_plan import chosen_plan
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED, DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.engine.engine import Engine
from specmoe_jax.jobs import job as jobs
from specmoe_jax.models.model import Model
from specmoe_jax.models.quantised import quantise
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.progress import PROGRESS

MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_ADAPTER = flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter (PEFT), merged into the model as it is loaded.")
_PRESET = flags.DEFINE_enum("preset", None, ["auto", *PRESETS], "The plan. Default: auto, chosen for this machine.")
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DRAFT_MODEL = flags.DEFINE_string("draft_model", None, "A checkpoint of the same vocabulary (draft=model).")
_DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head (draft=eagle); default: the bundled model's own.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32, where exactness holds.")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Prompt and answer together, at most. Default: the model's window, at most 2048.", lower_bound=2
)
_PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
flags.adopt_module_key_flags(plan_flags)


def load_engine(job: planning.Job, *, requests: int) -> Engine:
    """The engine that the flags give. job, requests: what the planner assumes where it chooses."""
    if _PLAN.value and (_PRESET.value or _DTYPE.value):
        common.usage_error(f"both --plan and --{'preset' if _PRESET.value else 'dtype'} are given; leave one out")
    common.use_compile_cache()
    folder = checkpoint_path(MODEL.value)
    head = jobs.read_head(folder)
    if head is None:
        raise CheckpointError(f"{folder}: no config.json; give a directory with a Hugging Face checkpoint")
    plan = _plan(head, folder, job, requests)
    plan.validate(head.config)
    model, changes = _load(plan)
    plan = plan.replace(**changes)
    given = {}
    if plan.drafting.given == "draft_head":
        given["draft_head"] = load_head(_DRAFT_HEAD.value or bundled_head(MODEL.value) or "", model)
    if _DRAFT_MODEL.value:
        given["draft_model"] = load_model(_DRAFT_MODEL.value, dtype=model.dtype, progress=_PROGRESS.value)
    if plan.drafting.given == "mtp_head":
        given["mtp_head"] = load_planned_mtp(model, plan)
    return Engine(model, plan, progress=_PROGRESS.value, **given)


def _plan(head: jobs.ModelHead, folder: pathlib.Path, job: planning.Job, requests: int) -> Plan:
    """The plan file, the preset or the planner's choice, with the flags over it."""
    own = {} if _DTYPE.value is None else {"dtype": _DTYPE.value}
    if _PLAN.value:
        return plan_flags.over(common.read_plan(_PLAN.value))
    if _PRESET.value not in (None, "auto"):
        return plan_flags.over(preset(_PRESET.value, head.config), **own)
    how: dict[str, Any] = {
        "requests": requests,
        "fixed": plan_flags.given() | own,
        "model": MODEL.value,
        "progress": _PROGRESS.value,
    }
    how |= {"draft_head": _DRAFT_HEAD.value, "draft_model": _DRAFT_MODEL.value}
    return chosen_plan(head, folder, job, **how)


def _load(plan: Plan) -> tuple[Model, dict]:
    """The model as the plan wants it, and the changes to the plan that make it fit."""
    packed = None if plan.expert_dtype == DECODED else plan.expert_dtype
    load = functools.partial(load_model, adapter=_ADAPTER.value)
    load = functools.partial(load, expert_dtype=plan.expert_dtype) if plan.expert_dtype and not packed else load
    how: dict[str, Any] = {"dtype": plan.dtype, "expert_tier": "disk" if packed else plan.expert_tier, "progress": _PROGRESS.value}
    model, changes = jobs.load_that_fits(load, MODEL.value, **how)
    return quantise(model, packed, plan.dense_dtype), changes
