"""Profiles this machine and a model's operators, and writes the plan that is predicted to be the fastest.

Example:
    specmoe plan --prompts=prompts.txt --requests=100 --output=plan.json
    specmoe plan --model=DIR --hardware=4090 --output=plan.json    (for another machine, by its rates; nothing is measured)
    specmoe generate --prompts=prompts.txt --plan=plan.json
"""

import json
import sys
import textwrap

from absl import flags

from specmoe_jax.autotune import choose as planning
from specmoe_jax.autotune.calibrate import calibrate
from specmoe_jax.autotune.profile import profile
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.eagle import bundled_head, load_head
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.mtp import holds_mtp, load_mtp
from specmoe_jax.cli import common
from specmoe_jax.cli.flag_groups import machine_flag, plan_flags
from specmoe_jax.cli.run_files import check_files
from specmoe_jax.cli.shown.machine_text import machine_text
from specmoe_jax.cli.shown.wrapped_text import WIDTH
from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.planner.calibration import Acceptance
from specmoe_jax.planner.measured.operators import as_table
from specmoe_jax.support.atomic_files import write_atomically

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_PROMPTS = flags.DEFINE_string("prompts", None, "A .txt or .jsonl file: acceptance and routing are measured on its first prompts.")
_DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head to consider; default: the bundled model's own.")
_ACCEPTANCE = flags.DEFINE_float("acceptance", None, "Of the self-draft per token, given instead of measured.")
_REQUESTS = flags.DEFINE_integer("requests", None, "Requests of the job; default: the prompts of --prompts, else 64.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", None, "Tokens of a prompt; default: the mean of --prompts, else 128.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens of a request.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute and weight type.")
_HARDWARE = flags.DEFINE_string("hardware", machine_flag.THIS, machine_flag.HELP)
_FRESH = flags.DEFINE_boolean("fresh", False, "Measure machine and operators again.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the plan goes, as JSON for specmoe generate --plan. Default: stdout.")
flags.adopt_module_key_flags(plan_flags)


def main() -> None:
    check_files(read={"--prompts": _PROMPTS.value}, written={"--output": _OUTPUT.value})
    common.use_compile_cache()
    folder = checkpoint_path(_MODEL.value)
    config = load_config(folder)
    elsewhere = _HARDWARE.value != machine_flag.THIS
    if elsewhere and flags.FLAGS["fresh"].present:
        common.usage_error("--fresh measures this machine, and --hardware names another; leave one out")
    named = machine_flag.read_hardware(_HARDWARE.value, fresh=_FRESH.value)
    hardware = machine_flag.with_budgets(named.hardware, plan_flags.budgets()) if elsewhere else named.hardware
    tell(machine_text(hardware))
    if named.said:
        tell(textwrap.fill(named.said, WIDTH))
    if not elsewhere:
        operators = profile(config, _DTYPE.value, fresh=_FRESH.value, progress=True) if config.encoder is None else None
        tell(wrapped(as_table(operators) if operators else "no operators were measured: the model has an encoder"))
    limits = SamplingParams(max_new_tokens=_NEW_TOKENS.value)
    prompts = [prompt.model_input for prompt in read_prompts(_PROMPTS.value, limits)] if _PROMPTS.value else []
    head_name = _DRAFT_HEAD.value or bundled_head(_MODEL.value)
    tokenizer = None
    if prompts:
        model = load_model(_MODEL.value, dtype=_DTYPE.value)
        tokenizer = model.tokenizer
        own_layer = load_mtp(model) if holds_mtp(config, open_checkpoint(folder)) else None
        head = load_head(head_name, model) if head_name else None
        found = calibrate(model, prompts, limits, head=head, mtp_head=own_layer)
        tell("acceptance per token: " + ", ".join(f"{name} {known.rate:.2f}" for name, known in found.acceptance.items()))
    job = planning.job_of(tokenizer, prompts, [_NEW_TOKENS.value])
    if _PROMPT_TOKENS.value or not prompts:
        job = job._replace(prompt_tokens=_PROMPT_TOKENS.value or 128)
    known = planning.know(config, _DTYPE.value, folder, job, hardware=hardware if elsewhere else None)
    if _ACCEPTANCE.value is not None:
        known = known._replace(calibration=given(known.calibration, _ACCEPTANCE.value))
    requests = _REQUESTS.value or len(prompts) or planning.REQUESTS
    fixed = plan_flags.given() | {"dtype": _DTYPE.value}
    chosen = planning.choose(config, known, requests=requests, fixed=fixed, head=head_name is not None)
    tell("\n".join(textwrap.fill(part, WIDTH) for part in f"{planning.as_line(chosen)} ({chosen.tried} plans)".split("; ")))
    text = chosen.best.plan.to_json() + "\n"
    if _OUTPUT.value:
        write_atomically(_OUTPUT.value, text)
    else:
        print(json.dumps(json.loads(text)))


def given(calibration, rate: float):
    """With the self-draft's acceptance as it was given, whatever its experts."""
    return calibration._replace(acceptance=calibration.acceptance | {"self": Acceptance(rate)}, measured=True)


def wrapped(text: str) -> str:
    """Lines in 80 columns; what one has beyond them goes on below, indented."""
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * 4, drop_whitespace=True) for line in text.splitlines())


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
