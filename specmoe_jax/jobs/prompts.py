"""Prompt files: text, one prompt a line; JSON lines, or rows of a table, with parameters of their own."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from specmoe_jax.checkpoints.chat import FIXED, encode_chat
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.jobs.openai_batch import BatchRequest, is_batch_line, read_line, request_of
from specmoe_jax.jobs.tables import is_table, read_rows
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_text, is_whole

CHAT_FIELDS = ("messages", "system", "tools", "documents", "chat_template_kwargs")
STDIN = "-"
TEMPLATE_OPTIONS = ("enable_thinking", "reasoning_effort")  # the ones that most templates with options know, without a nest


class Conversation(NamedTuple):
    """Messages for a chat template, and what else it is given."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None = None
    documents: tuple[dict, ...] | None = None
    options: dict = {}  # noqa: RUF012 (never written to)

    @property
    def text(self) -> str:
        """The last message, for people."""
        content = self.messages[-1].get("content")
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class Prompt(NamedTuple):
    """A prompt with the id that the output repeats, its parameters, and why it cannot be served (None: it can).

    token_ids: what the model is given where that is not the text itself (a chat template), else None. conversation: of a line that
    holds one. batch: of a line in the OpenAI batch form.
    """

    id: str | int
    text: str
    params: SamplingParams
    error: str | None = None
    token_ids: tuple[int, ...] | None = None
    conversation: Conversation | None = None
    batch: BatchRequest | None = None

    @property
    def model_input(self) -> str | tuple[int, ...]:
        """The text, or the ids in its place."""
        return self.text if self.token_ids is None else self.token_ids


class _Defaults(NamedTuple):
    """Of the lines of a file: parameters, and what joins them where a line is sampled though those are greedy."""

    params: SamplingParams
    sampled: dict


def as_chat(
    prompts: list[Prompt], folder: pathlib.Path, tokenizer: Tokenizer | None, *, keep_bad: bool, must_work: int, every: bool = True
) -> list[Prompt]:
    """The prompts under the chat template of a checkpoint directory, texts as messages of a user. every: False leaves texts alone.

    Raises CheckpointError for a template that is missing or fails, RequestError for a prompt that it refuses; with keep_bad
    that prompt gets an `error` instead, unless it is one of the first `must_work`.
    """
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer and the model has none; give token ids")

    def one(number: int, prompt: Prompt) -> Prompt:
        talk = prompt.conversation
        if talk is None and every and prompt.text:  # an empty text is refused with the others, later
            talk = Conversation(({"role": "user", "content": prompt.text},))
        if prompt.error or talk is None:
            return prompt
        given = talk.options | {"tools": talk.tools, "documents": talk.documents}
        try:
            return prompt._replace(token_ids=tuple(encode_chat(folder, tokenizer, talk.messages, **given)))
        except RequestError as e:
            if not keep_bad or number < must_work:
                raise
            return prompt._replace(error=str(e))

    return [one(number, prompt) for number, prompt in enumerate(prompts)]


def read_prompts(
    path: str, defaults: SamplingParams, *, sampled: dict | None = None, keep_bad: bool = False, column: str | None = None
) -> list[Prompt]:
    """Reads a .txt, .jsonl or .parquet file, a dataset's folder, or standard input ("-"). Raises RequestError naming the line.

    keep_bad: an invalid line becomes a Prompt with an `error` instead, as long jobs need. sampled: defaults of what only sampled
    requests have (top_k, top_p), for lines with a temperature of their own where `defaults` are greedy. column: of a table, see
    `tables.read_rows`.

    Text: empty lines are skipped, the id is the number of the prompt. JSON lines: objects with `prompt` or `messages`, and
    optionally `id`, `system`, `tools`, `documents`, options of the chat template and any field of SamplingParams; or requests in
    the OpenAI batch form. Rows: the same, a column for each field. Standard input is JSON lines if its first line is an object.
    """
    form = _Defaults(defaults, sampled or {})
    if is_table(path):
        prompts = prompts_of(read_rows(path, column), defaults, sampled=sampled, keep_bad=keep_bad, source=path)
    elif column is not None:
        raise RequestError(f"{path} has no columns, of which {column!r} is to be read; give a .parquet file or a dataset's folder")
    else:
        prompts = _of_lines(path, read_lines(path), form, keep_bad)
    if not prompts:
        raise RequestError(f"prompts file {path} holds no prompt; give at least one")
    return prompts


def prompts_of(
    rows: Iterable[dict[str, Any]], defaults: SamplingParams, *, sampled: dict | None = None, keep_bad: bool = False, source: str
) -> list[Prompt]:
    """Rows, each the fields of a JSON line, which are consumed. source: what messages call them. Raises as `read_prompts`."""
    form = _Defaults(defaults, sampled or {})
    numbered = ((number, f"row {number}", lambda row=row: row) for number, row in enumerate(rows, 1))
    return [_parse_or_keep(*row, form, keep_bad, source) for row in numbered]


def read_lines(path: str) -> list[str]:
    """Of a file or of standard input. Raises RequestError."""
    try:
        if path == STDIN:
            return sys.stdin.buffer.read().decode("utf-8-sig").split("\n")
        return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would split at U+2028, inside JSON too
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a NUL in the path
        form = '.txt with a prompt a line, or .jsonl with {"prompt": "..."} a line'
        raise RequestError(f"cannot read prompts from {path} ({e}); give a file in UTF-8, {form}") from e


def _of_lines(path: str, lines: Sequence[str], form: _Defaults, keep_bad: bool) -> list[Prompt]:
    suffix = pathlib.Path(path).suffix
    if path == STDIN:
        path, suffix = "standard input", ".jsonl" if _is_object(next(filter(str.strip, lines), "")) else ".txt"
    if suffix == ".jsonl":
        found = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        numbered = ((number, f"line {number}", lambda line=line, number=number: load_line(line, number)) for number, line in found)
        return [_parse_or_keep(*one, form, keep_bad, path) for one in numbered]
    if suffix == ".txt":
        return [Prompt(number, line, form.params) for number, line in enumerate(filter(str.strip, lines))]
    raise RequestError(
        f"prompts file {path} ends in {suffix!r}; it must be .txt (one a line), .jsonl, .parquet, a dataset's folder, or {STDIN}"
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def load_line(line: str, number: int) -> Any:
    """What a line of JSON holds. Raises RequestError that names the line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"line {number} is not JSON ({e}); give one object a line") from e


def _parse_or_keep(number: int, where: str, read: Callable[[], Any], form: _Defaults, keep_bad: bool, file: str) -> Prompt:
    """read: gives the fields of the line or row, which are consumed."""
    batch = None
    try:
        fields = read()
        batch = request_of(fields)
        return _parse(fields, number, where, form)
    except RequestError as e:
        if not keep_bad:
            raise RequestError(f"{file}: {e}") from e
        return Prompt(number - 1, "", form.params, error=str(e), batch=batch)


def _parse(fields: Any, number: int, where: str, defaults: _Defaults) -> Prompt:
    batch = None
    if isinstance(fields, dict) and is_batch_line(fields):
        batch, fields = read_line(fields, where)
    token_ids = _token_ids(fields, where)
    if not isinstance(fields, dict) or not (isinstance(fields.get("prompt"), str) or "messages" in fields):
        said = 'has no text "prompt"; give {"prompt": "...", "id": ...}, token ids in its place, or {"messages": [...]}'
        raise RequestError(f"{where} {said}")
    request_id, talk = fields.pop("id", number - 1), _conversation(fields, where)
    text = fields.pop("prompt") if talk is None else talk.text
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise RequestError(f"{where} has the id {request_id!r}; it must be a text or a whole number")
    whole = json.dumps([talk, text, str(request_id)], ensure_ascii=False)
    if not is_text(whole):
        raise RequestError(f"{where} holds half of a surrogate pair, which is no text; write the whole character")
    params = _params(fields, where, defaults)
    return Prompt(request_id, text, params, token_ids=token_ids, conversation=talk, batch=batch)


def _token_ids(fields: Any, where: str) -> tuple[int, ...] | None:
    """The ids of a prompt that is given as ids, whose text is empty then; None of any other."""
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), list):
        return None
    token_ids = tuple(fields["prompt"])
    if not token_ids or not all(map(is_whole, token_ids)) or "messages" in fields:
        raise RequestError(f'{where}: "prompt" is a list; it must be of token ids (whole numbers), at least one, without messages')
    fields["prompt"] = ""
    return token_ids


def _params(fields: dict, where: str, defaults: _Defaults) -> SamplingParams:
    """Those of a line over those of the job."""
    names = {field.name for field in dataclasses.fields(SamplingParams)} - {"logits_processor"}  # a function has no JSON
    if unknown := sorted(set(fields) - names):
        known = ", ".join(("prompt", "id", *sorted(names), *CHAT_FIELDS, *TEMPLATE_OPTIONS))
        raise RequestError(f"{where} has the unknown field {unknown[0]!r}; known are {known}")
    for name in ("stop", "banned_tokens", "stop_token_ids"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = _numbered(fields["logit_bias"], where)
    if fields.get("temperature") == 0:  # greedy: what is the default of sampled requests falls away
        fields = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | fields
    elif fields.get("temperature") is not None and defaults.params.temperature == 0:
        fields = defaults.sampled | fields
    try:
        return dataclasses.replace(defaults.params, **fields)
    except RequestError as e:
        raise RequestError(f"{where}: {e}") from e


def _numbered(bias: dict, where: str) -> dict:
    """With token ids for keys, which JSON writes as texts."""
    try:
        return {int(token): amount for token, amount in bias.items()}
    except ValueError as e:
        raise RequestError(f"{where}: logit_bias maps token ids to numbers, and a key is no id ({e})") from e


def _conversation(fields: dict, where: str) -> Conversation | None:
    """What the line says to a chat template, taken out of its fields; None of a plain prompt."""
    given = {key: fields.pop(key) for key in CHAT_FIELDS if key in fields}
    options = {key: fields.pop(key) for key in TEMPLATE_OPTIONS if key in fields}
    if not given and not options:
        return None
    lists = {key: _objects(given.get(key), key, where) for key in ("messages", "tools", "documents")}
    messages, system, nested = lists["messages"], given.get("system"), given.get("chat_template_kwargs") or {}
    if messages is None:
        messages = ({"role": "user", "content": fields.pop("prompt")},)
    elif "prompt" in fields:
        raise RequestError(f"{where} has both prompt and messages; give one of them")
    if not messages:
        raise RequestError(f"{where}: messages is empty; give at least one")
    if system is not None:
        if not isinstance(system, str) or messages[0].get("role") == "system":
            raise RequestError(f"{where}: system must be a text, and the only message of the system; leave one of them out")
        messages = ({"role": "system", "content": system}, *messages)
    if not isinstance(nested, dict) or (taken := sorted(set(nested) & set(FIXED))):
        said = "an object" if not isinstance(nested, dict) else f"without {taken[0]}, which is a field of its own"
        raise RequestError(f"{where}: chat_template_kwargs must be {said}")
    return Conversation(messages, lists["tools"], lists["documents"], options=nested | options)


def _objects(value, key: str, where: str) -> tuple[dict, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise RequestError(f"{where}: {key} is {str(value)[:50]!r}; it must be a list of objects")
    return tuple(value)
