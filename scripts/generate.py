"""Generates text with a Mixture-of-Experts model whose experts stay in host memory.

Example:
    python scripts/generate.py --prompt="Call me Ishmael." --preset=specmoe --max_new_tokens=64
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import sys
from typing import NamedTuple

import _common
import tqdm
from absl import flags

from specmoe_jax import Completion, Engine, Model, Plan, SamplingParams, load_model, metrics
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config, load_model_tokenizer
from specmoe_jax.checkpoints.manifest import checkpoint_hash
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config import (
    DRAFTS,
    DRAM_POLICIES,
    DTYPES,
    EXPERT_FLOWS,
    EXPERT_TIERS,
    GIB,
    KV_TIERS,
    PREFETCHES,
    PRESETS,
    ModelConfig,
    preset,
)
from specmoe_jax.engine.finish import safe_length
from specmoe_jax.engine.journal import Journal
from specmoe_jax.engine.prompts import Prompt, read_prompts
from specmoe_jax.engine.requests import check_job, refusal
from specmoe_jax.errors import PlanError, RequestError

_MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts: .txt, one a line, or .jsonl.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Where finished requests go, as JSON lines; the same command goes on after an interruption. Default: stdout."
)
_PRESET = flags.DEFINE_string("preset", None, f"One of {', '.join(PRESETS)}; default specmoe.")
_PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
_DRAFT = flags.DEFINE_enum("draft", None, [d for d in DRAFTS if d != "custom"], "Overrides the plan's draft.")
_DRAFT_MODEL = flags.DEFINE_string("draft_model", None, "A checkpoint of the same vocabulary (draft=model).")
_DRAFT_LENGTH = flags.DEFINE_integer("draft_length", None, "Tokens drafted per step.")
_DRAFT_EXPERTS = flags.DEFINE_integer("draft_experts", None, "Draft experts per layer: hot (draft=self) or merged (draft=merged).")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Requests that generate together.")
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", None, "Parts of a batch in flight at once.")
_KV_TIER = flags.DEFINE_enum("kv_tier", None, KV_TIERS, "Where the KV cache is and attention runs.")
_EXPERT_TIER = flags.DEFINE_enum("expert_tier", None, EXPERT_TIERS, "Where all experts are; disk needs --host_memory_gib.")
_DRAM_POLICY = flags.DEFINE_enum("dram_policy", None, DRAM_POLICIES, "Which experts host memory caches (expert_tier=disk).")
_BYPASS_PAGE_CACHE = flags.DEFINE_boolean("bypass_page_cache", False, "Read from the disk itself (expert_tier=disk).")
_EXPERT_FLOW = flags.DEFINE_enum("expert_flow", None, EXPERT_FLOWS, "How experts come to the accelerator.")
_DEVICE_GIB = flags.DEFINE_float("device_memory_gib", None, "Accelerator memory to use. Default: what the plan can use.")
_HOST_GIB = flags.DEFINE_float("host_memory_gib", None, "Host memory to use. Default: what the machine has.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32, where exactness holds.")
_LINK_GBPS = flags.DEFINE_float("link_gbps", None, "Emulate a link of that many GB/s (stamped on the figures).")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per request at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens; 0 is all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample within the smallest set of this probability mass.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_DETERMINISTIC = flags.DEFINE_boolean(
    "deterministic_sampling", False, "Draws depend on seed, request and position alone: same text with any plan."
)
_GUARD = flags.DEFINE_boolean("guard", False, "Adapt the draft length while running, down to 0 where it does not pay.")
_PREFETCH = flags.DEFINE_enum("prefetch", None, PREFETCHES, "What is fetched on a guess while the link is idle.")
_STOP = flags.DEFINE_multi_string("stop", [], "End a request at this text; may be repeated.")
_IGNORE_EOS = flags.DEFINE_boolean("ignore_eos", False, "Go on after an end-of-sequence token.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print text as it is committed.")
_RESTART = flags.DEFINE_boolean("restart", False, "Begin the job of --output anew instead of going on with it.")
_STATS = flags.DEFINE_string("stats", None, "Where the figures of the run go, as JSON.")


def main() -> None:
    watch = metrics.Stopwatch()
    prompts = read_all_prompts()
    for path in filter(None, (_OUTPUT.value, _STATS.value)):
        check_writable(path)
    if _OUTPUT.value and _OUTPUT.value == _STATS.value:
        raise RequestError(f"--output and --stats are both {_OUTPUT.value}; give two files")
    check_job_before_loading(prompts)
    _common.use_compile_cache()
    model = load_model(_MODEL.value, **load_options(), progress=True)
    draft_model = load_model(_DRAFT_MODEL.value, dtype=model.dtype, progress=True) if _DRAFT_MODEL.value else None
    engine = Engine(model, make_plan(model.config), draft_model=draft_model, progress=True)
    load_s = watch.seconds
    if _OUTPUT.value:
        run_job(engine, prompts)
    else:
        print_completions(generate(engine, list(enumerate(prompts)), None))
    stats = engine.stats() | {"load_s": load_s, "wall_s": watch.seconds}
    if _STATS.value:
        write_atomically(_STATS.value, json.dumps(stats, indent=2) + "\n")
    print(metrics.table(stats), file=sys.stderr)


def run_job(engine: Engine, prompts: list[Prompt]) -> None:
    """All requests that the output does not hold yet, each appended when it is finished.

    A prompt of a file that cannot be served becomes a record with finish_reason "error"; one of a flag ends the job
    before it begins.
    """
    reasons = refusals(engine.model, prompts)
    journal = Journal(_OUTPUT.value, fingerprint(prompts, engine.plan), restart=_RESTART.value)
    try:
        for index, reason in enumerate(reasons):
            if reason and index not in journal.done:
                journal.append(error_record(index, prompts[index], reason))
        todo = [(index, prompt) for index, prompt in enumerate(prompts) if index not in journal.done]
        if todo:
            generate(engine, todo, journal)
    finally:
        journal.close()


class ModelHead(NamedTuple):
    """What is known of a model before a weight is read."""

    config: ModelConfig
    tokenizer: Tokenizer | None


def check_job_before_loading(prompts: list[Prompt]) -> None:
    """Refuses a plan, a prompt or a memory budget that cannot work, before a weight is read."""
    path = checkpoint_path(_MODEL.value)
    if not (path / "config.json").is_file():
        return  # load_model says what is wrong
    config = load_config(path)
    head = ModelHead(config=config, tokenizer=load_model_tokenizer(path, config))
    plan = make_plan(config).validate(config)
    reasons = refusals(head, prompts) if _OUTPUT.value else [None] * len(prompts)
    good = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if reason is None]
    if good:
        check_job(head, plan, [prompt.text for prompt in good], [prompt.params for prompt in good])


def refusals(model: Model | ModelHead, prompts: list[Prompt]) -> list[str | None]:
    """Why each prompt cannot be served, or None. Raises RequestError for one that is given by a flag."""
    reasons = [p.error or refusal(model, index, p.text, p.params) for index, p in enumerate(prompts)]
    for reason in filter(None, reasons[: len(_PROMPT.value)]):
        raise RequestError(reason)
    return reasons


def fingerprint(prompts: list[Prompt], plan: Plan) -> dict:
    """What the finished requests of a job depend on.

    Batch size and the rest of the plan are not in it: greedy and deterministic sampling do not depend on them, and
    ordinary sampling keeps its distribution.
    """
    texts = hashlib.sha256(json.dumps([(p.id, p.text, dataclasses.asdict(p.params)) for p in prompts]).encode())
    return {
        "prompts": texts.hexdigest(),
        "model": checkpoint_hash(checkpoint_path(_MODEL.value)),
        "dtype": plan.dtype,
        "deterministic_sampling": plan.deterministic_sampling,
    }


def record(index: int, prompt: Prompt, completion: Completion) -> dict:
    fields = dataclasses.asdict(completion)
    return fields | {"id": prompt.id, "index": index, "num_new_tokens": len(completion.token_ids)}


def error_record(index: int, prompt: Prompt, reason: str) -> dict:
    empty = Completion(index, prompt.text, "", (), "error", 0)
    return record(index, prompt, empty) | {"error": reason}


def read_all_prompts() -> list[Prompt]:
    """Prompts of the flags and then of the file, with the sampling flags as their defaults."""
    if _TEMPERATURE.value == 0 and flags.FLAGS["seed"].present:
        raise RequestError("seed has no effect at temperature 0; set a temperature or leave it out")
    if _TEMPERATURE.value == 0 and _DETERMINISTIC.value:
        raise RequestError("deterministic_sampling has no effect at temperature 0; set a temperature or leave it out")
    defaults = SamplingParams(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop=tuple(_STOP.value),
        ignore_eos=_IGNORE_EOS.value,
    )
    prompts = [Prompt(number, text, defaults) for number, text in enumerate(_PROMPT.value)]
    if _PROMPTS.value:
        prompts += read_prompts(_PROMPTS.value, defaults, keep_bad=_OUTPUT.value is not None)
    if not prompts:
        _common.usage_error("no prompt; give --prompt=TEXT or --prompts=FILE")
    return prompts


def load_options() -> dict[str, str]:
    """The weights' type and the experts' place have to be known before the model is loaded; the plan is made after it."""
    plan = read_plan_file() if _PLAN.value else Plan(preset="")
    return {"dtype": _DTYPE.value or plan.dtype, "expert_tier": _EXPERT_TIER.value or plan.expert_tier}


def read_plan_file() -> Plan:
    if _PRESET.value is not None:
        raise PlanError("both --plan and --preset are given; leave one out")
    try:
        return Plan.from_json(pathlib.Path(_PLAN.value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the plan {_PLAN.value} ({e}); write one with Plan.to_json or scripts/plan.py") from e


def make_plan(config: ModelConfig) -> Plan:
    """The preset or plan file with the choices that are given as flags."""
    plan = read_plan_file() if _PLAN.value else preset(_PRESET.value or "specmoe", config)
    overrides = {
        "draft": _DRAFT.value,
        "draft_length": _DRAFT_LENGTH.value,
        "draft_experts": _DRAFT_EXPERTS.value,
        "batch_size": _BATCH_SIZE.value,
        "guard": _GUARD.value or None,
        "prefetch": _PREFETCH.value,
        "deterministic_sampling": _DETERMINISTIC.value or None,
        "micro_batches": _MICRO_BATCHES.value,
        "kv_tier": _KV_TIER.value,
        "expert_tier": _EXPERT_TIER.value,
        "dram_policy": _DRAM_POLICY.value,
        "bypass_page_cache": _BYPASS_PAGE_CACHE.value or None,
        "expert_flow": _EXPERT_FLOW.value,
        "dtype": _DTYPE.value,
        "device_memory_bytes": _to_bytes(_DEVICE_GIB.value, GIB),
        "host_memory_bytes": _to_bytes(_HOST_GIB.value, GIB),
        "link_bytes_per_s": _to_bytes(_LINK_GBPS.value, 1e9),
    }
    if _DRAFT.value == "none":  # switching the draft off takes its settings along
        plan = plan.replace(draft_length=None, draft_experts=None)
    return plan.replace(**{name: value for name, value in overrides.items() if value is not None})


def _to_bytes(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def generate(engine: Engine, numbered: list[tuple[int, Prompt]], journal: Journal | None) -> list[Completion]:
    """Runs prompts with a progress bar (none when not a terminal); completions in the order in which they finish."""
    done, by_index = [], dict(numbered)
    indices, prompts = list(by_index), list(by_index.values())
    printed = {index: Printed(engine.model, prompt.params.stop) for index, prompt in numbered} if _STREAM.value else {}
    quiet = _STREAM.value or not sys.stderr.isatty()
    total = sum(prompt.params.max_new_tokens for prompt in prompts)
    with tqdm.tqdm(total=total, unit="tok", disable=quiet, desc="decode") as bar:

        def on_step(info) -> None:
            bar.update(int(info.committed.sum()))
            active = max(int(info.active.sum()), 1)
            bar.set_postfix_str(f"{info.committed.sum() / active:.2f} tokens/step")

        texts, params = [prompt.text for prompt in prompts], [prompt.params for prompt in prompts]
        for event in engine.stream(texts, params, ids=indices, on_step=on_step):
            if _STREAM.value:
                print_piece(event, printed[event.id], several=len(prompts) > 1)
            if event.completion is None:
                continue
            if journal:
                journal.append(record(event.id, by_index[event.id], event.completion))
            else:
                done.append(event.completion)
    return done


class Printed:
    """The text of one request so far, and how much of it has been printed."""

    def __init__(self, model: Model, stop: tuple[str, ...]):
        self._decoder, self._stop, self._text, self._length = model.tokenizer.stream(), stop, "", 0

    def push(self, event) -> str:
        """The text to print now; what may turn out to begin a stop string is held back."""
        self._text += "".join(self._decoder.push(token) for token in event.token_ids)
        done = event.completion
        text = self._text[: safe_length(self._text, self._stop)] if done is None else done.text
        piece, self._length = text[self._length :], max(self._length, len(text))
        return piece


def print_piece(event, printed: Printed, several: bool) -> None:
    """Prints the text of one event; with several prompts, one line each with the number of the prompt."""
    text = printed.push(event)
    if several:
        print(f"[{event.id}] {text!r}", flush=True)
    else:
        print(text, end="\n" if event.completion else "", flush=True)


def print_completions(completions: list[Completion]) -> None:
    """The texts, in the order of the prompts (--stream has printed them already)."""
    for completion in sorted(completions, key=lambda completion: completion.id):
        if not _STREAM.value:
            print(f"[{completion.id}] {completion.prompt}{completion.text}\n")


def check_writable(path: str) -> None:
    """Refuses a path that could not be written to, before anything is computed."""
    with writing_to(path):
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        with open(f"{path}.partial", "w"):
            pass


def write_atomically(path: str, text: str) -> None:
    """Writes beside the file and renames, so that nothing half-written is left."""
    with writing_to(path):
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.partial", path)


@contextlib.contextmanager
def writing_to(path: str):
    """Says in one line why a file cannot be written, and leaves no part of it behind."""
    try:
        yield
    except OSError as e:
        raise RequestError(f"cannot write {path} ({e.strerror}); give a file in a folder that exists and is writable") from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.partial")


if __name__ == "__main__":
    _common.run(main)
