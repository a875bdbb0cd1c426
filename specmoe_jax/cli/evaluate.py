"""Evaluates a model: tasks of lm-evaluation-harness, or the perplexity of a text file without it.

Example:
    specmoe evaluate --model=demo --text=book.txt
    specmoe evaluate --model=DIR --tasks=arc_easy,gsm8k --num_fewshot=5 --output=answers.jsonl
The last line on stdout is one JSON document.
"""

import json
import pathlib
import sys

from absl import flags

from specmoe_jax.checkpoints import load_model
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import plan_flags
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED, DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.engine.engine import Engine
from specmoe_jax.evaluation import Perplexity, harness_model, perplexity, run_tasks
from specmoe_jax.models.quantised import quantise
from specmoe_jax.support.atomic_files import check_writable, write_atomically
from specmoe_jax.support.errors import PlanError, RequestError
from specmoe_jax.support.progress import PROGRESS

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_ADAPTER = flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter (PEFT), merged into the model as it is loaded.")
_TEXT = flags.DEFINE_string("text", None, "A UTF-8 text file whose perplexity is told.")
_TASKS = flags.DEFINE_list("tasks", None, "Tasks of lm-evaluation-harness, by name (needs the [eval] extra).")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A folder with task files of your own.")
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each question. Default: what a task says.", lower_bound=0)
_LIMIT = flags.DEFINE_integer("limit", None, "Only so many questions of each task.", lower_bound=1)
_CHAT = flags.DEFINE_boolean("chat", False, "Put questions through the model's chat template (needs jinja2).")
_WINDOW = flags.DEFINE_integer("window", None, "Tokens that the model reads at a time at most. Default: its window.", lower_bound=2)
_OVERLAP = flags.DEFINE_integer("overlap", None, "Tokens that a window of --text shares with the one before at least. Default: 0.")
_OUTPUT = flags.DEFINE_string("output", None, "Keeps the answers of --tasks; the same command goes on after an interruption.")
_RESTART = flags.DEFINE_boolean("restart", False, "Begin --output anew instead of going on with it.")
_RESULTS = flags.DEFINE_string("results", None, "Where the JSON document goes too.")
_PRESET = flags.DEFINE_enum(
    "preset", None, [*PRESETS], "The plan. Default: streaming, whose layers cross the link once for all texts."
)
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32, or the plan's.")
_PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
flags.adopt_module_key_flags(plan_flags)

_OF_TASKS = (_INCLUDE_PATH, _NUM_FEWSHOT, _LIMIT, _CHAT, _OUTPUT)


def main() -> None:
    check_flags()
    text = read_text(_TEXT.value) if _TEXT.value else ""
    for path in filter(None, (_OUTPUT.value, _RESULTS.value)):
        check_writable(path)
    common.use_compile_cache()
    begun = common.read_plan(_PLAN.value) if _PLAN.value else None
    dtype, tier = (begun.dtype, begun.expert_tier) if begun else (_DTYPE.value or "float32", "host")
    tier = plan_flags.value("expert_tier") or tier
    packing = plan_flags.value("expert_dtype") or (begun.expert_dtype if begun else None)
    if packing not in (None, DECODED):
        raise PlanError(f"evaluate takes no plan with expert_dtype={packing}; give the engine to specmoe_jax.evaluation")
    dense_dtype = plan_flags.value("dense_dtype") or (begun.dense_dtype if begun else None)
    how = {"expert_tier": tier, "expert_dtype": packing, "adapter": _ADAPTER.value, "progress": _PROGRESS.value}
    model = quantise(load_model(_MODEL.value, dtype=dtype, **how), dense_dtype=dense_dtype)
    engine = Engine(model, make_plan(begun, model.config, dtype), progress=_PROGRESS.value)
    found = of_text(engine, text) if _TEXT.value else of_tasks(engine)
    document = json.dumps(found | {"model": _MODEL.value, "stats": engine.stats()}, default=str)
    if _RESULTS.value:
        write_atomically(_RESULTS.value, document + "\n")
    print(document)


def check_flags() -> None:
    if bool(_TEXT.value) == bool(_TASKS.value):
        common.usage_error("give --text=FILE or --tasks=NAMES, one of them")
    for flag in (_PRESET, _DTYPE):
        if _PLAN.value and flag.value:
            common.usage_error(f"both --plan and --{flag.name} are given; leave one out")
    idle = [flag.name for flag in _OF_TASKS if flag.value not in (None, False)] if _TEXT.value else []
    idle += ["restart"] if _RESTART.value and not _OUTPUT.value else []
    idle += ["overlap"] if _TASKS.value and _OVERLAP.value is not None else []
    if idle:
        other = "without --output" if idle[0] == "restart" else "with --text" if _TEXT.value else "with --tasks"
        common.usage_error(f"--{idle[0]} has no effect {other}; leave it out")


def make_plan(begun: Plan | None, config: ModelConfig, dtype: str) -> Plan:
    """The plan file or the preset, with the flags over it."""
    plan = plan_flags.over(begun or preset(_PRESET.value or "streaming", config).replace(dtype=dtype))
    if plan.drafting.given:
        raise PlanError("evaluate takes no plan with a draft model or a head; give the engine to specmoe_jax.evaluation")
    return plan


def read_text(path: str) -> str:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"cannot read the text {path} ({e}); give a UTF-8 file") from e
    if not text.strip():
        raise RequestError(f"the text {path} is empty; give a file with words in it")
    return text


def of_text(engine: Engine, text: str) -> dict:
    found = perplexity(engine, text, window=_WINDOW.value, overlap=_OVERLAP.value or 0)
    print(as_lines(found), file=sys.stderr)
    return found.to_dict()


def as_lines(found: Perplexity) -> str:
    return (
        f"perplexity {found.per_token:.4f} per token, {found.per_word:.4f} per word, {found.bits_per_byte:.4f} bits per byte\n"
        f"{found.tokens} tokens, {found.words} words, {found.utf8_bytes} bytes in {found.seconds:.2f} s"
    )


def of_tasks(engine: Engine) -> dict:
    model = harness_model(engine, answers=_OUTPUT.value, restart=_RESTART.value, max_length=_WINDOW.value, progress=_PROGRESS.value)
    options = {"num_fewshot": _NUM_FEWSHOT.value, "limit": _LIMIT.value, "apply_chat_template": _CHAT.value}
    found = run_tasks(model, _TASKS.value or [], include_path=_INCLUDE_PATH.value, **options)
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                print(f"{task}  {name}  {value:.4f}", file=sys.stderr)
    return {"results": found["results"], "versions": found.get("versions"), "samples": found.get("n-samples")}
