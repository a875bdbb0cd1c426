"""A job: many prompts, one output file, and a record for every prompt, served or not."""

import dataclasses
import gc
import hashlib
import itertools
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from specmoe_jax.checkpoints.adapters.peft import adapter_hash
from specmoe_jax.checkpoints.loader import load_config
from specmoe_jax.checkpoints.manifest import checkpoint_hash
from specmoe_jax.checkpoints.model_tokenizer import load_model_tokenizer, with_end_tokens
from specmoe_jax.checkpoints.published.advice import check_form, tokenizer_advice
from specmoe_jax.checkpoints.published.quantisation import check_quantisation
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.requests.prepare import check_job, make_requests, refusal
from specmoe_jax.jobs.journal import Journal
from specmoe_jax.jobs.openai_batch import response
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.jobs.routing_traces import write_trace
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.models.model import Model
from specmoe_jax.models.quantised import logit_error, quantise
from specmoe_jax.support.errors import CheckpointError, PinnedMemoryError, RequestError

SAMPLE_PROMPTS, SAMPLE_TOKENS = 8, 64  # on which quantised experts are compared with exact ones
RECORDS_AT_ONCE = 1000  # error records to an fsync: one each took 10,000 of them 10 seconds
CACHE_SHARE = 0.75  # of the available pinned memory, if it does not hold all experts


class ModelHead(NamedTuple):
    """The parts of a model that are known before a weight is read."""

    config: ModelConfig
    tokenizer: Tokenizer | None


def read_head(path: pathlib.Path) -> ModelHead | None:
    """Config and tokenizer of a checkpoint directory; None where there is no config, which load_model explains.

    Raises CheckpointError with what to do for a directory in another form.
    """
    check_form(path)
    if not (path / "config.json").is_file():
        return None
    config = load_config(path)
    check_quantisation(path, config)
    tokenizer = load_model_tokenizer(path, config)
    if tokenizer is None and (advice := tokenizer_advice(path)):  # prompts of a job are texts
        raise CheckpointError(advice)
    return ModelHead(config=with_end_tokens(config, tokenizer), tokenizer=tokenizer)


def quantised(
    exact: Model, expert_dtype: str | None, dense_dtype: str | None, prompts: list[Prompt]
) -> tuple[Model, dict[str, float]]:
    """A model with packed weights, and how far its logits are from those of the exact one on some of the prompts.

    expert_dtype and dense_dtype: as of quantise. Experts that are packed are read one by one, and again for the comparison.
    -> figures for the statistics, none where no prompt can be served.
    """
    model, sample = quantise(exact, expert_dtype, dense_dtype), []
    served = (p for i, p in enumerate(prompts) if p.error is None and refusal(model, i, p.model_input, p.params) is None)
    for prompt in itertools.islice(served, SAMPLE_PROMPTS):
        (request,) = make_requests(model, [prompt.model_input], None)
        sample.append((request.source or request.token_ids)[:SAMPLE_TOKENS])
    error = logit_error(exact, model, sample) if sample else {}
    return model, {f"quantised_{name}": value for name, value in error.items()}


def load_that_fits(load: Callable[..., Model], name: str, *, dtype: str, expert_tier: str, progress: str) -> tuple[Model, dict]:
    """A model, and the changes to its plan that make it fit; none if pinned memory for all experts is available.

    Where the system refuses it, experts stay on disk and host memory becomes a cache of them, with a warning. It takes a
    part of the available memory, as others need some too. load: load_model. Raises PinnedMemoryError without room for a cache.
    """
    try:
        return load(name, dtype=dtype, expert_tier=expert_tier, progress=progress), {}
    except PinnedMemoryError as e:
        pinned_bytes = e.pinned_bytes  # not the error, whose traceback would keep the memory
        cache_bytes = int(pinned_bytes * CACHE_SHARE)
        if expert_tier == "disk" or cache_bytes == 0:
            raise
    gc.collect()  # the error and the frames that hold the blocks refer to each other
    warnings.warn(
        f"{pinned_bytes / 1e9:.3f} GB of experts fit into pinned host memory and no more; the others stay on disk: "
        f"expert_tier=disk, host_memory_bytes={cache_bytes}",
        RuntimeWarning,
        stacklevel=2,
    )
    model = load(name, dtype=dtype, expert_tier="disk", progress=progress)
    return model, {"expert_tier": "disk", "host_memory_bytes": cache_bytes}


def check_before_loading(head: ModelHead, plan: Plan, prompts: list[Prompt], *, keep_bad: bool, must_work: int, **drafts) -> None:
    """Refuses a plan, a prompt or a memory budget that cannot work. Raises PlanError or RequestError.

    drafts: draft_head and draft_model of `check_job`. keep_bad, must_work: as in `refusals`; without keep_bad the first bad prompt
    is the error.
    """
    plan.validate(head.config)
    reasons = refusals(head, prompts, must_work=must_work) if keep_bad else [None] * len(prompts)
    good = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if reason is None]
    if good:
        check_job(head, plan, [prompt.model_input for prompt in good], [prompt.params for prompt in good], **drafts)


def refusals(model: Model | ModelHead, prompts: list[Prompt], *, must_work: int = 0, first: int = 0) -> list[str | None]:
    """Why each prompt cannot be served, or None. Raises RequestError for one of the first `must_work` of them.

    first: the number of the first one in the whole job.
    """
    numbered = enumerate(prompts, first)
    reasons = [prompt.error or refusal(model, number, prompt.model_input, prompt.params) for number, prompt in numbered]
    for reason in filter(None, reasons[:must_work]):
        raise RequestError(reason)
    return reasons


def record_errors(prompts: list[Prompt], reasons: list[str | None], journal: Journal, *, first: int = 0) -> dict[int, Prompt]:
    """Writes a record with finish_reason "error" for each prompt with a reason. -> numbered prompts still to do.

    first: as of `refusals`.
    """
    numbered = enumerate(reasons, first)
    refused = [(number, reason) for number, reason in numbered if reason and number not in journal.done]
    for start in range(0, len(refused), RECORDS_AT_ONCE):
        some = refused[start : start + RECORDS_AT_ONCE]
        journal.append(*(error_record(number, prompts[number - first], reason) for number, reason in some))
    return {number: prompt for number, prompt in enumerate(prompts, first) if number not in journal.done}


def run_job(engine: Engine, todo: dict[int, Prompt], journal: Journal, watch: JobWatch, *, on_event=None, traces=None) -> None:
    """Serves numbered prompts, each appended to the journal when it is finished. watch, on_event, traces: of `completions`."""
    for completion in completions(engine, todo, watch, on_event=on_event, traces=traces):
        journal.append(record(completion.id, todo[completion.id], completion))


def completions(
    engine: Engine,
    prompts: dict[int, Prompt],
    watch: JobWatch,
    *,
    on_event: Callable[[TokenEvent], None] | None = None,
    traces: pathlib.Path | None = None,
) -> Iterator[Completion]:
    """Completions of numbered prompts in the order in which they finish; none for none.

    on_event: called beside the watch. traces: a folder that gets the routing of each before it is yielded.
    """
    if not prompts:
        return
    texts, params = [prompt.model_input for prompt in prompts.values()], [prompt.params for prompt in prompts.values()]
    for event in engine.stream(texts, params, ids=list(prompts), on_step=watch.on_step):
        watch.on_event(event)
        if on_event is not None:
            on_event(event)
        if event.completion is not None:
            if traces is not None:
                write_trace(traces, event.completion)
            yield dataclasses.replace(event.completion, prompt=prompts[event.id].text)


def fingerprint(
    prompts: list[Prompt], plan: Plan, model: pathlib.Path, adapter: pathlib.Path | None = None, routing: str | None = None
) -> dict:
    """Everything that the finished requests of a job depend on.

    Batch size and the rest of the plan are not in it: greedy and deterministic sampling do not depend on them, and
    ordinary sampling keeps its distribution. routing: what of it is written beside the output.
    """
    texts = hashlib.sha256(json.dumps([(p.id, p.model_input, _identity(p.params)) for p in prompts]).encode())
    optional = {"adapter": adapter and adapter_hash(adapter), "routing": routing, "dense_dtype": plan.dense_dtype}
    return {
        "prompts": texts.hexdigest(),
        "model": checkpoint_hash(model),
        "dtype": plan.dtype,
        "expert_dtype": plan.expert_dtype,
        "deterministic_sampling": plan.deterministic_sampling,
        "synthetic_acceptance": plan.synthetic_acceptance,  # its text is not the model's
    } | {name: value for name, value in optional.items() if value}


def _identity(params: SamplingParams) -> dict:
    """The parameters as a job is known by them: fields that came later count where they are used, so older jobs go on."""
    first = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos")
    if params.logits_processor is not None:
        raise RequestError("a job cannot have a logits_processor, which nothing identifies across runs; use Engine.generate")
    fields = {field.name: field.default for field in dataclasses.fields(params)}
    return {name: getattr(params, name) for name, default in fields.items() if name in first or getattr(params, name) != default}


def record(index: int, prompt: Prompt, completion: Completion) -> dict:
    """A line of the output, in the form of the answers to an OpenAI batch where the prompt came from one."""
    if prompt.batch is not None:
        return response(index, prompt.batch, completion)
    fields = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion) if field.name != "routing"}
    fields |= {"channels": completion.channels} if completion.channels else {}
    for name in ("error", "logprobs", "prompt_logprobs"):
        if fields[name] is None:
            del fields[name]
        elif name != "error":
            fields[name] = [token._asdict() for token in fields[name]]
    return fields | {"id": prompt.id, "index": index, "num_new_tokens": len(completion.token_ids)}


def error_record(index: int, prompt: Prompt, reason: str) -> dict:
    """A line of the output for a prompt that cannot be served."""
    return record(index, prompt, Completion(index, prompt.text, "", (), "error", 0, reason))
