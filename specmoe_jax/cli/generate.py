"""Generates text with a Mixture-of-Experts model whose experts stay in host memory.

Example:
    specmoe generate --prompt="Call me Ishmael." --preset=specmoe --max_new_tokens=64
"""

import contextlib
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from specmoe_jax.autotune import choose as planning
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.adapters.peft import read_adapter
from specmoe_jax.checkpoints.eagle import bundled_head, head_config, head_path, load_head
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.mtp import find_mtp, load_planned_mtp
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.cli import common, shared_job
from specmoe_jax.cli.flag_groups import plan_flags, process_flags, sampling_flags
from specmoe_jax.cli.flag_groups.chosen_plan import chosen_plan
from specmoe_jax.cli.run_files import check_files
from specmoe_jax.cli.shown.answers import print_completions, print_piece
from specmoe_jax.cli.shown.stats_table import table
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED, DTYPES
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.config.sampling_params import OF_DRAWS
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.engine.runtime import plan_homes
from specmoe_jax.engine.validation import check_popularity
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import STDIN, Prompt, as_chat, read_prompts
from specmoe_jax.jobs.routing_traces import prepare_folder, read_popularity
from specmoe_jax.jobs.shards import Part, parse_shard
from specmoe_jax.jobs.tables import as_table, check_output, lines_of, write_table
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.support import processes
from specmoe_jax.support.atomic_files import write_atomically
from specmoe_jax.support.errors import PlanError, RequestError
from specmoe_jax.support.progress import PROGRESS
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.support.tracing import trace, write_lanes

SAMPLED_PROMPTS = 64  # whose lengths stand for all of a job's

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "A file of prompts: .txt, one a line, .jsonl or .parquet; a dataset's folder; or - for standard input."
)
_PROMPT_COLUMN = flags.DEFINE_string(
    "prompt_column", None, "The column of a table that holds the prompts; others but id are left out. Default: each is a field."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where finished requests go: JSON lines, or .parquet; the same command goes on after an interruption. Default: stdout.",
)
_PRESET = flags.DEFINE_enum(
    "preset", None, ["auto", *PRESETS], "The plan; README.md says what each does. Default: auto, chosen for this machine and job."
)
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DRAFT_MODEL = flags.DEFINE_string("draft_model", None, "A checkpoint of the same vocabulary (draft=model).")
_DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head (draft=eagle); default: the bundled model's own.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32, where exactness holds.")
_CHAT = flags.DEFINE_boolean("chat", False, "Prompts are messages of a user, put through the model's chat template (needs jinja2).")
_ADAPTER = flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter (PEFT), merged into the model as it is loaded.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print text as it is committed.")
_SHARD = flags.DEFINE_string(
    "shard",
    None,
    "The part i/n of the job that this run does, 1/n to n/n, into a file of its own; specmoe merge_outputs joins them.",
)
_RESTART = flags.DEFINE_boolean("restart", False, "Begin the job of --output anew instead of going on with it.")
_STATS = flags.DEFINE_string("stats", None, "Where the figures of the run go, as JSON.")
_METRICS_FILE = flags.DEFINE_string("metrics_file", None, "Where the figures so far go each second, in Prometheus' text format.")
_PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
_TRACE = flags.DEFINE_string(
    "trace", None, "A folder for a profile of the generation (perfetto_trace.json.gz in it; lanes.json of a streamed plan)."
)
_ROUTING_TRACES = flags.DEFINE_string(
    "routing_traces", None, "A folder for the experts that each token was sent to: NUMBER.npz for each request (docs/formats.md)."
)
_ROUTING_WEIGHTS = flags.DEFINE_boolean("routing_weights", False, "With --routing_traces: the weights of the experts too.")
_POPULARITY = flags.DEFINE_string(
    "popularity",
    None,
    "With --placement=popularity: what --routing_traces wrote, the folder or a file, or .npy of counts [layers, experts].",
)
flags.adopt_module_key_flags(plan_flags)
flags.adopt_module_key_flags(process_flags)
flags.adopt_module_key_flags(sampling_flags)


join = process_flags.join


def main() -> None:
    watch = Stopwatch()
    if not (_PROMPT.value or _PROMPTS.value):
        common.usage_error("no prompt; give --prompt=TEXT or --prompts=FILE")
    if _RESTART.value and not _OUTPUT.value:
        common.usage_error("--restart has no effect without --output; leave it out")
    if _SHARD.value and (_PROMPT.value or not _OUTPUT.value):
        common.usage_error("--shard is of a job with --prompts and --output, without --prompt; give both, or leave it out")
    if _ROUTING_WEIGHTS.value and not _ROUTING_TRACES.value:
        common.usage_error("--routing_weights has no effect without --routing_traces; give both")
    shared_job.check_flags(auto=is_auto(), prompts=_PROMPTS.value)
    folder = checkpoint_path(_MODEL.value)
    part = part_of(read_all_prompts(folder))
    if processes.is_first():
        check_run_files(part)
    if _DRAFT_HEAD.value:
        head_path(_DRAFT_HEAD.value)  # says what is wrong before a weight is read
    if _ADAPTER.value:
        read_adapter(_ADAPTER.value)  # says what is wrong before the machine is measured
    common.use_compile_cache()
    if head := jobs.read_head(folder):
        keep_bad = _OUTPUT.value is not None
        how = {"keep_bad": keep_bad, "must_work": len(_PROMPT.value)}
        if _CHAT.value or any(prompt.conversation for prompt in part.prompts):
            part = part._replace(prompts=as_chat(part.prompts, folder, head.tokenizer, every=_CHAT.value, **how))
        if is_auto():  # a bad prompt is told before the machine is measured
            jobs.check_before_loading(head, preset("resident", head.config), part.own, **how)
        plan = make_plan(head, folder, part.own)
        jobs.check_before_loading(head, plan, part.own, **how, **draft_configs(head, plan))
        if plan.drafting.given == "mtp_head":
            find_mtp(folder, head.config)
        popularity = read_popularity(pathlib.Path(_POPULARITY.value), head.config) if _POPULARITY.value else None
        check_popularity(head.config, plan, popularity)
        homes = None if popularity is None else plan_homes(head.config, plan, popularity)
    loading, prompts = Stopwatch(), part.own
    model, changes, error = load(prompts, homes, plan.devices)
    draft_model = load_model(_DRAFT_MODEL.value, dtype=model.dtype, progress=progress_mode()) if _DRAFT_MODEL.value else None
    if changes and is_auto():  # experts went to the disk, where not every plan runs
        dtype = {} if _DTYPE.value is None else {"dtype": _DTYPE.value}
        plan = auto_plan(jobs.ModelHead(model.config, model.tokenizer), folder, prompts, plan_flags.given() | dtype | changes)
    else:
        plan = plan.replace(**changes)
    spans = [] if _TRACE.value and plan.flow.workers else None
    given = {"draft_model": draft_model, "draft_head": read_head(model, plan)}
    given |= {"mtp_head": load_planned_mtp(model, plan)} if plan.drafting.given == "mtp_head" else {}
    options = given | {"progress": progress_mode(), "spans": spans, "routing": routing_detail(), "popularity": popularity}
    shared_job.check_alike(part, model, plan, popularity, routing_detail())
    engine = Engine(model, plan, **options)
    load_s = loading.seconds
    if not processes.is_first():
        shared_job.follow(engine, part)
        return
    with trace(_TRACE.value):
        job = generate(engine, part)
    if spans is not None and _TRACE.value:
        write_lanes(spans, pathlib.Path(_TRACE.value) / "lanes.json")
    stats = final_stats(engine, prompts) | error | {"load_s": load_s, "wall_s": watch.seconds, "requests": job.timings}
    if _STATS.value:
        write_atomically(_STATS.value, json.dumps(stats, indent=2) + "\n")
    if job.timings:  # else nothing was left to do
        print(table(stats), file=sys.stderr)
    if job.failed:
        print(f'warning: {job.failed} of {len(prompts)} prompts have no answer; "error" in their records says why', file=sys.stderr)


def check_run_files(part: Part) -> None:
    """Raises RequestError for files that cannot be written."""
    check_files(
        read={"--prompts": None if _PROMPTS.value == STDIN else _PROMPTS.value, "--plan": _PLAN.value},
        output=part.output and lines_of(part.output),
        written=({"the table of --output": part.output} if as_table(part.output) else {})
        | {"--stats": _STATS.value, "--metrics_file": _METRICS_FILE.value},
        trace=_TRACE.value,
    )


def read_head(model: Model, plan: Plan) -> EagleHead | None:
    name = head_name(plan)
    return load_head(name, model) if name else None


def head_name(plan: Plan) -> str | None:
    """The head of --draft_head, or the bundled one of the bundled model where the plan drafts with one."""
    return _DRAFT_HEAD.value or (bundled_head(_MODEL.value) if plan.drafting.given == "draft_head" else None)


def draft_configs(head: jobs.ModelHead, plan: Plan) -> dict:
    """What is known of the plan's draft before it is loaded."""
    name, folder = head_name(plan), _DRAFT_MODEL.value
    return {
        "draft_head": head_config(name, head.config) if name and plan.drafting.given == "draft_head" else None,
        "draft_model": load_config(checkpoint_path(folder)) if folder and plan.drafting.given == "draft_model" else None,
    }


def part_of(prompts: list[Prompt]) -> Part:
    """The part of the job that this run does."""
    if not _SHARD.value or not _OUTPUT.value:
        return Part(prompts, None, _OUTPUT.value)
    shard = parse_shard(_SHARD.value)
    return Part(prompts, shard, shard.output(_OUTPUT.value))


def generate(engine: Engine, part: Part) -> JobWatch:
    """The job of --output, or the texts on stdout. -> what was told of it."""
    prompts, numbered = part.own, dict(enumerate(part.own, part.first))
    streamed = numbered if _STREAM.value else {}
    shown = {i: IncrementalText(engine.model, prompt.params.stop, prompt.model_input) for i, prompt in streamed.items()}

    def watched(todo: dict[int, Prompt], failed: int) -> JobWatch:
        limits = [prompt.params.max_new_tokens for prompt in todo.values()]
        progress = "none" if _STREAM.value else _PROGRESS.value
        return JobWatch(engine, limits, progress=progress, metrics_file=_METRICS_FILE.value, failed=failed)

    def on_event(event: TokenEvent) -> None:
        if shown:
            print_piece(event, shown[event.id], several=len(prompts) > 1)

    traces = pathlib.Path(_ROUTING_TRACES.value) if _ROUTING_TRACES.value else None
    if not part.output:
        shared_job.agreed_numbers(numbered)
        if traces is not None:
            prepare_folder(traces, done=())
        with watched(numbered, failed=0) as watch:
            done = list(jobs.completions(engine, numbered, watch, on_event=on_event, traces=traces))
            if not _STREAM.value:
                print_completions(done, apart=_CHAT.value)
        return watch
    reasons = jobs.refusals(engine.model, prompts, must_work=len(_PROMPT.value), first=part.first)
    assert engine.model.path is not None  # it was loaded
    job = jobs.fingerprint(part.prompts, engine.plan, engine.model.path, engine.model.adapter, routing_detail()) | part.identity
    with contextlib.closing(Journal(lines_of(part.output), job, restart=_RESTART.value, requests=len(part.prompts))) as journal:
        if traces is not None:
            prepare_folder(traces, journal.done - {index for index, reason in enumerate(reasons, part.first) if reason})
        todo = jobs.record_errors(prompts, reasons, journal, first=part.first)
        if done := len(prompts) - len(todo) - sum(map(bool, reasons)):
            print(f"{done} of {len(prompts)} prompts were done before, {len(todo)} are left: {part.output}", file=sys.stderr)
        shared_job.agreed_numbers(todo)
        with watched(todo, failed=sum(map(bool, reasons))) as watch:
            jobs.run_job(engine, todo, journal, watch, on_event=on_event, traces=traces)
        journal.check_present()
        write_table(part.output)
    return watch


def progress_mode() -> str:
    """Of this process: the first one shows it."""
    return _PROGRESS.value if processes.is_first() else "none"


def routing_detail() -> str | None:
    """Of Engine: what --routing_traces asks for."""
    return None if not _ROUTING_TRACES.value else "weights" if _ROUTING_WEIGHTS.value else "ids"


def read_all_prompts(folder: pathlib.Path) -> list[Prompt]:
    """Prompts of the flags and then of the file, with the sampling flags, or else the model's own defaults."""
    sampling = sampling_flags.sampling(folder)
    # What only sampled requests take; the lines of a file may be sampled where the flags say greedy.
    drawn = {name: sampling[name] for name in OF_DRAWS}
    some_may_be_sampled = _PROMPTS.value is not None and sampling["temperature"] == 0
    defaults = sampling_flags.params(sampling | (OF_DRAWS if some_may_be_sampled else {}))
    if not _OUTPUT.value and (flag := sampling_flags.given_logprobs()):
        raise RequestError(f"--{flag} has no effect without --output, whose records hold them; give both")
    prompts = [Prompt(number, text, defaults) for number, text in enumerate(_PROMPT.value)]
    if _PROMPTS.value:
        prompts += read_prompts(
            _PROMPTS.value, defaults, sampled=drawn, keep_bad=_OUTPUT.value is not None, column=_PROMPT_COLUMN.value
        )
    elif _PROMPT_COLUMN.value:
        raise RequestError("--prompt_column has no effect without --prompts; leave it out")
    if _OUTPUT.value and as_table(_OUTPUT.value):
        check_output(_OUTPUT.value, prompts)
    if all(prompt.params.temperature == 0 for prompt in prompts):
        refuse_without_effect(drawn)
    return prompts


def refuse_without_effect(drawn: dict[str, Any]) -> None:
    """Raises RequestError for flags that matter to sampled requests alone."""
    given = {"--seed": flags.FLAGS["seed"].present, "--deterministic_sampling": plan_flags.value("deterministic_sampling")}
    given |= {f"--{name}": drawn[name] != neutral for name, neutral in OF_DRAWS.items()}
    for flag in filter(given.get, given):
        raise RequestError(f"{flag} has no effect at temperature 0; set a temperature or leave it out")


def load(prompts: list[Prompt], homes: np.ndarray | None, devices: int) -> tuple[Model, dict, dict]:
    """The model, changes to its plan that make it fit, and the logit error of its quantised experts, as figures.

    The weights' types and the experts' place have to be known before the model is loaded. homes: as of load_model.
    """
    plan = read_plan_file() if _PLAN.value else Plan(preset="")
    load = functools.partial(load_model, adapter=_ADAPTER.value, devices=devices, homes=homes)
    dtype, expert_dtype = _DTYPE.value or plan.dtype, plan_flags.value("expert_dtype") or plan.expert_dtype
    if expert_dtype not in (None, DECODED):
        options = {"dtype": dtype, "expert_dtype": expert_dtype, "prompts": prompts, "progress": progress_mode()}
        model, error = jobs.load_quantised(load, _MODEL.value, **options)
        return model, {}, error
    tier = plan_flags.value("expert_tier") or plan.expert_tier
    load_as = functools.partial(load, expert_dtype=expert_dtype) if expert_dtype else load
    if processes.several():  # the same place for experts in all of them
        return load_as(_MODEL.value, dtype=dtype, expert_tier=tier, progress=progress_mode()), {}, {}
    return *jobs.load_that_fits(load_as, _MODEL.value, dtype=dtype, expert_tier=tier, progress=_PROGRESS.value), {}


def read_plan_file() -> Plan:
    assert _PLAN.value is not None
    if _PRESET.value is not None:
        raise PlanError("both --plan and --preset are given; leave one out")
    return common.read_plan(_PLAN.value)


def final_stats(engine: Engine, prompts: list[Prompt]) -> dict:
    """The figures of the run, with the roofline bound of this machine and the planner's prediction."""
    model, known = engine.model, None
    with contextlib.suppress(PlanError):  # a plan that runs, though not within what the machine has at this moment
        known = planning.know(model.config, model.dtype, model.path, job_of(model.tokenizer, prompts))
        prediction = planning.evaluate(model.config, engine.plan, known)
        return engine.stats(known.hardware, prediction)
    return engine.stats(known and known.hardware)


def make_plan(head: jobs.ModelHead, folder: pathlib.Path, prompts: list[Prompt]) -> Plan:
    """The plan file, the preset or the planner's choice, with what is given as flags."""
    overrides: dict[str, Any] = {} if _DTYPE.value is None else {"dtype": _DTYPE.value}
    if is_auto():
        return auto_plan(head, folder, prompts, plan_flags.given() | overrides)
    plan = read_plan_file() if _PLAN.value else preset(_PRESET.value or "", head.config)
    if processes.several():  # one device of each, unless told
        count = jax.process_count()
        overrides |= {"num_processes": count, "devices": plan_flags.value("devices") or max(plan.devices, count)}
    return plan_flags.over(plan, **overrides)


def is_auto() -> bool:
    """Whether the planner chooses, the default."""
    return _PLAN.value is None and (_PRESET.value or "auto") == "auto"


def auto_plan(head: jobs.ModelHead, folder: pathlib.Path, prompts: list[Prompt], overrides: dict) -> Plan:
    """The planner's choice for these prompts."""
    how: dict[str, Any] = {"requests": len(prompts), "fixed": overrides, "model": _MODEL.value, "progress": _PROGRESS.value}
    how |= {"draft_head": _DRAFT_HEAD.value, "draft_model": _DRAFT_MODEL.value}
    return chosen_plan(head, folder, job_of(head.tokenizer, prompts), **how)


def job_of(tokenizer: Tokenizer | None, prompts: list[Prompt]) -> planning.Job:
    """Lengths of the prompts that can be read, the first few of them."""
    texts = [prompt.model_input for prompt in prompts[:SAMPLED_PROMPTS] if prompt.error is None]
    return planning.job_of(tokenizer, texts, [prompt.params.max_new_tokens for prompt in prompts])
