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
from specmoe_jax.cli.flag_groups import generate_flags as own
from specmoe_jax.cli.flag_groups import plan_flags, process_flags, sampling_flags
from specmoe_jax.cli.flag_groups.chosen_plan import chosen_plan
from specmoe_jax.cli.job_prompts import part_of, read_all_prompts
from specmoe_jax.cli.run_files import check_files
from specmoe_jax.cli.shown.answers import print_completions, print_piece
from specmoe_jax.cli.shown.stats_table import table
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED
from specmoe_jax.config.presets import preset
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.engine.runtime import plan_homes
from specmoe_jax.engine.validation import check_popularity
from specmoe_jax.jobs import job as jobs
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.prompts import STDIN, Prompt, as_chat
from specmoe_jax.jobs.routing_traces import prepare_folder, read_popularity
from specmoe_jax.jobs.shards import Part
from specmoe_jax.jobs.tables import as_table, lines_of, write_table
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.support import processes
from specmoe_jax.support.atomic_files import write_atomically
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.support.tracing import trace, write_lanes

SAMPLED_PROMPTS = 64  # whose lengths stand for all of a job's

flags.adopt_module_key_flags(own)
flags.adopt_module_key_flags(plan_flags)
flags.adopt_module_key_flags(process_flags)
flags.adopt_module_key_flags(sampling_flags)


join = process_flags.join


def main() -> None:
    watch = Stopwatch()
    if not (own.PROMPT.value or own.PROMPTS.value):
        common.usage_error("no prompt; give --prompt=TEXT or --prompts=FILE")
    if own.RESTART.value and not own.OUTPUT.value:
        common.usage_error("--restart has no effect without --output; leave it out")
    if own.SHARD.value and (own.PROMPT.value or not own.OUTPUT.value):
        common.usage_error("--shard is of a job with --prompts and --output, without --prompt; give both, or leave it out")
    if own.ROUTING_WEIGHTS.value and not own.ROUTING_TRACES.value:
        common.usage_error("--routing_weights has no effect without --routing_traces; give both")
    shared_job.check_flags(auto=is_auto(), prompts=own.PROMPTS.value)
    folder = checkpoint_path(own.MODEL.value)
    part = part_of(read_all_prompts(folder))
    if processes.is_first():
        check_run_files(part)
    if own.DRAFT_HEAD.value:
        head_path(own.DRAFT_HEAD.value)  # says what is wrong before a weight is read
    if own.ADAPTER.value:
        read_adapter(own.ADAPTER.value)  # says what is wrong before the machine is measured
    common.use_compile_cache()
    popularity, homes, devices = None, None, 1  # where nothing can be read, the load says why
    if head := jobs.read_head(folder):
        keep_bad = own.OUTPUT.value is not None
        how = {"keep_bad": keep_bad, "must_work": len(own.PROMPT.value)}
        if own.CHAT.value or any(prompt.conversation for prompt in part.prompts):
            part = part._replace(prompts=as_chat(part.prompts, folder, head.tokenizer, every=own.CHAT.value, **how))
        if is_auto():  # a bad prompt is told before the machine is measured
            jobs.check_before_loading(head, preset("resident", head.config), part.own, **how)
        plan = make_plan(head, folder, part.own)
        jobs.check_before_loading(head, plan, part.own, **how, **draft_configs(head, plan))
        if plan.drafting.given == "mtp_head":
            find_mtp(folder, head.config)
        popularity = read_popularity(pathlib.Path(own.POPULARITY.value), head.config) if own.POPULARITY.value else None
        check_popularity(head.config, plan, popularity)
        homes = None if popularity is None else plan_homes(head.config, plan, popularity)
        devices = plan.devices
    loading, prompts = Stopwatch(), part.own
    model, changes, error = load(prompts, homes, devices)
    draft_model = load_model(own.DRAFT_MODEL.value, dtype=model.dtype, progress=progress_mode()) if own.DRAFT_MODEL.value else None
    if changes and is_auto():  # experts went to the disk, where not every plan runs
        dtype = {} if own.DTYPE.value is None else {"dtype": own.DTYPE.value}
        plan = auto_plan(jobs.ModelHead(model.config, model.tokenizer), folder, prompts, plan_flags.given() | dtype | changes)
    else:
        plan = plan.replace(**changes)
    spans = [] if own.TRACE.value and plan.flow.workers else None
    given = {"draft_model": draft_model, "draft_head": read_head(model, plan)}
    given |= {"mtp_head": load_planned_mtp(model, plan)} if plan.drafting.given == "mtp_head" else {}
    options = given | {"progress": progress_mode(), "spans": spans, "routing": routing_detail(), "popularity": popularity}
    shared_job.check_alike(part, model, plan, popularity, routing_detail())
    engine = Engine(model, plan, **options)
    load_s = loading.seconds
    if not processes.is_first():
        shared_job.follow(engine, part)
        return
    with trace(own.TRACE.value):
        job = generate(engine, part)
    if spans is not None and own.TRACE.value:
        write_lanes(spans, pathlib.Path(own.TRACE.value) / "lanes.json")
    stats = final_stats(engine, prompts) | error | {"load_s": load_s, "wall_s": watch.seconds, "requests": job.timings}
    if own.STATS.value:
        write_atomically(own.STATS.value, json.dumps(stats, indent=2) + "\n")
    if job.timings:  # else nothing was left to do
        print(table(stats), file=sys.stderr)
    if job.failed:
        print(f'warning: {job.failed} of {len(prompts)} prompts have no answer; "error" in their records says why', file=sys.stderr)


def check_run_files(part: Part) -> None:
    """Raises RequestError for files that cannot be written."""
    check_files(
        read={"--prompts": None if own.PROMPTS.value == STDIN else own.PROMPTS.value, "--plan": own.PLAN.value},
        output=part.output and lines_of(part.output),
        written=({"the table of --output": part.output} if as_table(part.output) else {})
        | {"--stats": own.STATS.value, "--metrics_file": own.METRICS_FILE.value},
        trace=own.TRACE.value,
    )


def read_head(model: Model, plan: Plan) -> EagleHead | None:
    name = head_name(plan)
    return load_head(name, model) if name else None


def head_name(plan: Plan) -> str | None:
    """The head of --draft_head, or the bundled one of the bundled model where the plan drafts with one."""
    return own.DRAFT_HEAD.value or (bundled_head(own.MODEL.value) if plan.drafting.given == "draft_head" else None)


def draft_configs(head: jobs.ModelHead, plan: Plan) -> dict:
    """What is known of the plan's draft before it is loaded."""
    name, folder = head_name(plan), own.DRAFT_MODEL.value
    return {
        "draft_head": head_config(name, head.config) if name and plan.drafting.given == "draft_head" else None,
        "draft_model": load_config(checkpoint_path(folder)) if folder and plan.drafting.given == "draft_model" else None,
    }


def generate(engine: Engine, part: Part) -> JobWatch:
    """The job of --output, or the texts on stdout. -> what was told of it."""
    prompts, numbered = part.own, dict(enumerate(part.own, part.first))
    streamed = numbered if own.STREAM.value else {}
    shown = {i: IncrementalText(engine.model, prompt.params.stop, prompt.model_input) for i, prompt in streamed.items()}

    def watched(todo: dict[int, Prompt], failed: int) -> JobWatch:
        limits = [prompt.params.max_new_tokens for prompt in todo.values()]
        progress = "none" if own.STREAM.value else own.PROGRESS.value
        return JobWatch(engine, limits, progress=progress, metrics_file=own.METRICS_FILE.value, failed=failed)

    def on_event(event: TokenEvent) -> None:
        if shown:
            print_piece(event, shown[event.id], several=len(prompts) > 1)

    traces = pathlib.Path(own.ROUTING_TRACES.value) if own.ROUTING_TRACES.value else None
    if not part.output:
        shared_job.agreed_numbers(numbered)
        if traces is not None:
            prepare_folder(traces, done=())
        with watched(numbered, failed=0) as watch:
            done = list(jobs.completions(engine, numbered, watch, on_event=on_event, traces=traces))
            if not own.STREAM.value:
                print_completions(done, apart=own.CHAT.value)
        return watch
    reasons = jobs.refusals(engine.model, prompts, must_work=len(own.PROMPT.value), first=part.first)
    assert engine.model.path is not None  # it was loaded
    job = jobs.fingerprint(part.prompts, engine.plan, engine.model.path, engine.model.adapter, routing_detail()) | part.identity
    with contextlib.closing(Journal(lines_of(part.output), job, restart=own.RESTART.value, requests=len(part.prompts))) as journal:
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
    return own.PROGRESS.value if processes.is_first() else "none"


def routing_detail() -> str | None:
    """Of Engine: what --routing_traces asks for."""
    return None if not own.ROUTING_TRACES.value else "weights" if own.ROUTING_WEIGHTS.value else "ids"


def load(prompts: list[Prompt], homes: np.ndarray | None, devices: int) -> tuple[Model, dict, dict]:
    """The model, changes to its plan that make it fit, and the logit error of its quantised experts, as figures.

    The weights' types and the experts' place have to be known before the model is loaded. homes: as of load_model.
    """
    plan = read_plan_file() if own.PLAN.value else Plan(preset="")
    load = functools.partial(load_model, adapter=own.ADAPTER.value, devices=devices, homes=homes)
    dtype, expert_dtype = own.DTYPE.value or plan.dtype, plan_flags.value("expert_dtype") or plan.expert_dtype
    dense_dtype = plan_flags.value("dense_dtype") or plan.dense_dtype
    tier = plan_flags.value("expert_tier") or plan.expert_tier
    packed = None if expert_dtype == DECODED else expert_dtype
    load_as = functools.partial(load, expert_dtype=expert_dtype) if expert_dtype and not packed else load
    how = {"dtype": dtype, "expert_tier": "disk" if packed else tier, "progress": progress_mode()}
    if processes.several():  # the same place for experts in all of them
        model, changes = load_as(own.MODEL.value, **how), {}
    else:
        model, changes = jobs.load_that_fits(load_as, own.MODEL.value, **how)
    if packed or dense_dtype:
        model, error = jobs.quantised(model, packed, dense_dtype, prompts)
        return model, changes, error
    return model, changes, {}


def read_plan_file() -> Plan:
    assert own.PLAN.value is not None
    if own.PRESET.value is not None:
        raise PlanError("both --plan and --preset are given; leave one out")
    return common.read_plan(own.PLAN.value)


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
    overrides: dict[str, Any] = {} if own.DTYPE.value is None else {"dtype": own.DTYPE.value}
    if is_auto():
        return auto_plan(head, folder, prompts, plan_flags.given() | overrides)
    plan = read_plan_file() if own.PLAN.value else preset(own.PRESET.value or "", head.config)
    if processes.several():  # one device of each, unless told
        count = jax.process_count()
        overrides |= {"num_processes": count, "devices": plan_flags.value("devices") or max(plan.devices, count)}
    return plan_flags.over(plan, **overrides)


def is_auto() -> bool:
    """Whether the planner chooses, the default."""
    return own.PLAN.value is None and (own.PRESET.value or "auto") == "auto"


def auto_plan(head: jobs.ModelHead, folder: pathlib.Path, prompts: list[Prompt], overrides: dict) -> Plan:
    """The planner's choice for these prompts."""
    how: dict[str, Any] = {"requests": len(prompts), "fixed": overrides, "model": own.MODEL.value, "progress": own.PROGRESS.value}
    how |= {"draft_head": own.DRAFT_HEAD.value, "draft_model": own.DRAFT_MODEL.value}
    return chosen_plan(head, folder, job_of(head.tokenizer, prompts), **how)


def job_of(tokenizer: Tokenizer | None, prompts: list[Prompt]) -> planning.Job:
    """Lengths of the prompts that can be read, the first few of them."""
    texts = [prompt.model_input for prompt in prompts[:SAMPLED_PROMPTS] if prompt.error is None]
    return planning.job_of(tokenizer, texts, [prompt.params.max_new_tokens for prompt in prompts])
