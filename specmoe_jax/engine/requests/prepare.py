"""Prompts and parameters -> requests, or an error that names the prompt. Nothing runs before all are checked."""

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from specmoe_jax.checkpoints.published.advice import tokenizer_advice
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.grammars import make_grammar
from specmoe_jax.engine.state import JobOptions, Request
from specmoe_jax.models.eagle.config import EagleConfig
from specmoe_jax.planner.memory.account import cache_positions
from specmoe_jax.planner.memory.fit import Memories, accounted, nearest, with_nearest
from specmoe_jax.planner.memory.memory_account import DraftMemory, MemoryAccount, PagedLoad
from specmoe_jax.planner.workload import Workload
from specmoe_jax.speculate.logit_edits import edit_kinds
from specmoe_jax.support.errors import BudgetError, PlanError, RequestError
from specmoe_jax.support.validation import is_text, shown

UNLIMITED_BYTES = float(1 << 60)  # of a machine of which the plan's own budgets alone count


class Reader(Protocol):
    """What prompts are checked against: a Model, or what is known of one before a weight is read."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Any: ...


class BatchShape(NamedTuple):
    """The compiled shapes: rows, KV positions S and prefill chunk. paged: what a streamed batch may fill, else None.

    source: positions of an encoder, 0 without one. options: of the steps, which compile differently for each. beside: further
    rows, of the caches in which a service reads prompts.
    """

    rows: int
    positions: int
    chunk: int
    paged: PagedLoad | None = None
    source: int = 0
    options: JobOptions = JobOptions()
    beside: int = 0


def resolved(plan: Plan) -> Plan:
    """The plan with its machine-dependent defaults filled in. Raises PlanError where the machine has too few devices."""
    there, jobs = len(jax.local_devices()), jax.process_count()
    if plan.num_processes > 1 and plan.num_processes != jobs:
        raise PlanError(f"num_processes={plan.num_processes} and jax.distributed has {jobs}; start as many, or leave it 1")
    if plan.devices > 1 and jobs > 1 and plan.num_processes == 1:
        raise PlanError(f"devices={plan.devices} of {jobs} processes; give num_processes={jobs} too")
    if plan.devices > plan.num_processes * there:
        each = "this process has" if plan.num_processes == 1 else "each process has"
        raise PlanError(f"devices={plan.devices} and {each} {there}; give at most as many")
    return plan.resolved(accelerator_is_cpu=accelerator_is_cpu())


def accelerator_is_cpu() -> bool:
    """Whether the accelerator is the CPU itself."""
    return jax.local_devices()[0] == jax.local_devices(backend="cpu")[0]


def batch_shape_of(plan: Plan, requests: list[Request]) -> BatchShape:
    """The shapes that all batches of these requests share."""
    prompt = max(len(request.token_ids) for request in requests)
    longest = max(len(request.token_ids) + request.limit for request in requests)
    rows = min(plan.batch_size, len(requests))
    source = max(len(request.source) for request in requests)
    return BatchShape(
        rows=plan.flow.batch_rows(plan, rows),
        positions=cache_positions(longest, plan),
        chunk=min(plan.prefill_chunk, 1 << max(prompt - 2, 0).bit_length()),
        paged=plan.flow.paged_load(plan, [(len(request.token_ids), request.limit) for request in requests], rows),
        source=source and max(8, 1 << (source - 1).bit_length()),
        options=options_of([request.params for request in requests]),
    )


def options_of(params: list[SamplingParams]) -> JobOptions:
    """What requests with these parameters ask for together."""

    def most(name: str) -> int | None:
        return max((count for p in params if (count := getattr(p, name)) is not None), default=None)

    return JobOptions(logprobs=most("logprobs"), prompt_logprobs=most("prompt_logprobs"), edits=edit_kinds(params))


def job_account(config: ModelConfig, plan: Plan, batch_shape: BatchShape, draft: DraftMemory) -> MemoryAccount:
    """The memory that a job of these shapes takes, for the check before it and for the engine alike. Raises BudgetError."""
    return accounted(
        config,
        plan,
        batch_rows=batch_shape.rows,
        positions=batch_shape.positions,
        source_positions=batch_shape.source,
        draft=draft,
        paged=batch_shape.paged,
        accelerator_is_cpu=accelerator_is_cpu(),
        beside_rows=batch_shape.beside,
    )


def smallest_job(config: ModelConfig, plan: Plan) -> BatchShape:
    """Of one request of one token that asks for one more: no job takes less."""
    params, encoder = SamplingParams(max_new_tokens=1), config.encoder
    start, source = ((0,), ()) if encoder is None else (encoder.start, (0,))
    return batch_shape_of(plan, [Request(id=0, prompt=None, token_ids=start, params=params, limit=1, source=source)])


def check_job(
    model: Reader, plan: Plan, prompts, params, *, draft_head: EagleConfig | None = None, draft_model: ModelConfig | None = None
) -> MemoryAccount:
    """Refuses what `Engine.generate` would refuse, before a weight is read. -> the memory that the job takes.

    draft_head, draft_model: their configurations; without one
    an EAGLE head is assumed to have the published size, and a draft model to take no memory.
    Raises PlanError, which names the nearest plan that fits, or RequestError.
    """
    plan = resolved(plan.validate(model.config))
    requests = make_requests(model, prompts, params)
    batch_shape = batch_shape_of(plan, requests)
    try:
        memory = plan.drafting.memory(plan, model.config, head=draft_head, model=draft_model)
        return job_account(model.config, plan, batch_shape, memory)
    except BudgetError as e:
        prompt = max(len(request.token_ids) for request in requests)
        longest = max(len(request.token_ids) + request.limit for request in requests)
        workload = Workload(
            prompt_tokens=prompt,
            new_tokens=max(longest - prompt, 1),
            source_tokens=batch_shape.source,
            head=draft_head,
            draft_model=draft_model,
        )
        smaller = plan.replace(batch_size=min(plan.batch_size, batch_shape.rows))
        machine = Memories(UNLIMITED_BYTES, UNLIMITED_BYTES, accelerator_is_cpu=accelerator_is_cpu())
        raise BudgetError(with_nearest(str(e), nearest(model.config, smaller, machine, workload))) from None


def make_requests(
    model: Reader,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    ids: Sequence[int] | None = None,
) -> list[Request]:
    """One Request per prompt. params: one for all, one each, or None for the defaults. ids: None for 0, 1, 2, ...

    Sampling is keyed by the ids, so a job that resumes gives each request the id that it had. Raises RequestError.
    """
    if isinstance(prompts, str | bytes | Mapping | Set):
        said = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise RequestError(f"prompts is {said}; give a list of texts (or of token-id lists)")
    prompts = _listed(prompts, "prompts", "a list of texts (or of token-id lists)")
    if len(prompts) == 0:
        raise RequestError("no prompts were given; give at least one")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    params = _listed(params, "params", "one SamplingParams for all, or a list of one each")
    if wrong := [p for p in params if not isinstance(p, SamplingParams)]:
        raise RequestError(f"params holds {shown(wrong[0])}; give one SamplingParams for all, or a list of one each")
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(params)} sampling parameters; give one for all or one each")
    ids = range(len(prompts)) if ids is None else _checked_ids(_listed(ids, "ids", "one whole number each"), len(prompts))
    return [_request(model, i, prompt, p) for i, prompt, p in zip(ids, prompts, params, strict=True)]


def _listed(values: Iterable, name: str, expected: str) -> list:
    """What may be a generator, as a list."""
    try:
        return list(values)
    except TypeError as e:
        raise RequestError(f"{name} is {shown(values)}; give {expected}") from e


def refusal(model: Reader, index: int, prompt: str | Sequence[int], params: SamplingParams) -> str | None:
    """Why prompt number `index` cannot be served, or None."""
    try:
        make_requests(model, [prompt], params, [index])
    except RequestError as e:
        return str(e)
    return None


def _request(model: Reader, index: int, prompt: str | Sequence[int], params: SamplingParams) -> Request:
    text = prompt if isinstance(prompt, str) else None
    if (text is not None or params.stop) and model.tokenizer is None:
        advice = tokenizer_advice(getattr(model, "path", None))
        told = f" ({advice})" if advice else ""
        said = 'give token ids ("prompt": [1, 2, 3] in a .jsonl file) and no stop strings'
        raise RequestError(f"prompt {index} needs a tokenizer and the model has none; {said}{told}")
    if text is not None and not is_text(text):
        raise RequestError(f"prompt {index} holds half of a surrogate pair, or bytes that are not UTF-8; give it in UTF-8")
    if text == "":  # also where the tokenizer would put a token of its own before it
        raise RequestError(f"prompt {index} is empty; give at least one character")
    token_ids = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else _token_ids(index, prompt)
    stop_ids = _stop_ids(index, model.tokenizer, params.stop) + params.stop_token_ids
    window, vocab = model.config.max_positions, model.config.vocab_size
    _check_vocabulary(index, params, vocab, has_encoder=model.config.encoder is not None)
    if not token_ids:
        raise RequestError(f"prompt {index} is empty; give at least one token")
    if not all(0 <= token < vocab for token in token_ids):
        raise RequestError(f"prompt {index} holds a token id outside 0..{vocab - 1}, the model's vocabulary")
    if len(token_ids) >= window:
        raise RequestError(
            f"prompt {index} has {len(token_ids)} tokens and the model's window is {window}, one of them for the answer; "
            f"shorten it to {window - 1}"
        )
    encoder = model.config.encoder
    asked = {"id": index, "prompt": text, "params": params, "stop_ids": stop_ids}
    asked["grammar"] = make_grammar(index, model.tokenizer, vocab, model.config.eos_token_ids, params)
    if encoder is None:
        return Request(token_ids=token_ids, limit=min(params.max_new_tokens, window - len(token_ids)), **asked)
    assert model.config.embedding is not None  # it has an encoder
    if model.config.embedding.pad_id in token_ids:
        raise RequestError(f"prompt {index} holds the padding token {model.config.embedding.pad_id}; leave it out")
    limit = min(params.max_new_tokens, window - len(encoder.start))
    return Request(token_ids=encoder.start, limit=limit, source=token_ids, **asked)


def _check_vocabulary(index: int, params: SamplingParams, vocab: int, *, has_encoder: bool) -> None:
    """What of the parameters depends on the model. Raises RequestError."""
    biased = (token for token, _ in params.bias_pairs)
    for name, ids in (("logit_bias", biased), ("banned_tokens", params.banned_tokens), ("stop_token_ids", params.stop_token_ids)):
        if outside := [token for token in ids if token >= vocab]:
            raise RequestError(f"prompt {index}: {name} names token {outside[0]}, outside 0..{vocab - 1}, the model's vocabulary")
    if len(set(params.banned_tokens)) == vocab:
        raise RequestError(f"prompt {index}: banned_tokens bans all {vocab} tokens; leave at least one")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab:
            raise RequestError(
                f"prompt {index}: {name} is {getattr(params, name)} and the vocabulary has {vocab} tokens; give less"
            )
    if has_encoder and params.prompt_logprobs is not None:
        raise RequestError(
            f"prompt {index}: an encoder-decoder has no prompt_logprobs, its prompt is what the encoder reads; leave it out"
        )


def _stop_ids(index: int, tokenizer, stop: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of the stop strings that are special tokens. Raises RequestError for one that holds more than such a token."""
    if not isinstance(tokenizer, Tokenizer) or tokenizer.shows_special:  # where texts show them they are found there
        return ()
    ids = {string: tokenizer.special_id(string) for string in stop}
    for string, found in ids.items():
        if found is None and (token := tokenizer.special_in(string)):
            said = f"prompt {index}: stop {string!r} holds the special token {token} beside other text"
            raise RequestError(f"{said}; give {token} alone")
    return tuple(found for found in ids.values() if found is not None)


def _checked_ids(ids: Sequence[int], count: int) -> list[int]:
    try:
        numbers = [operator.index(request_id) for request_id in ids]
    except TypeError as e:
        raise RequestError(f"the ids of the requests are not all whole numbers ({e})") from e
    if len(numbers) != count or len(set(numbers)) != count:
        raise RequestError(f"{count} prompts and {len(set(numbers))} different ids; give one of its own to each")
    if not all(0 <= number < 1 << 32 for number in numbers):
        raise RequestError(
            f"the ids of the requests are {min(numbers)} to {max(numbers)}; they must be within 0 to {(1 << 32) - 1}"
        )
    return numbers


def _token_ids(index: int, prompt: Iterable[int]) -> tuple[int, ...]:
    try:
        if isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set):
            raise TypeError(f"it is a {type(prompt).__name__}")
        tokens = tuple(prompt)
        if any(isinstance(token, bool | np.bool_) for token in tokens):
            raise TypeError("it holds a bool")
        return tuple(operator.index(token) for token in tokens)
    except TypeError as e:
        raise RequestError(f"prompt {index} is neither a text nor a list of token ids ({e}); prompts is a list of prompts") from e
