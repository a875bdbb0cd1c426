"""Prompt files: text, one prompt a line, or JSON lines with parameters of their own."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

from specmoe_jax.checkpoints.chat import encode_chat
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.support.errors import RequestError


class Prompt(NamedTuple):
    """A prompt with the id that the output repeats, its parameters, and why it cannot be served (None: it can).

    token_ids: what the model is given where that is not the text itself (a chat template), else None.
    """

    id: str | int
    text: str
    params: SamplingParams
    error: str | None = None
    token_ids: tuple[int, ...] | None = None

    @property
    def model_input(self) -> str | tuple[int, ...]:
        """The text, or the ids in its place."""
        return self.text if self.token_ids is None else self.token_ids


def as_chat(
    prompts: list[Prompt], folder: pathlib.Path, tokenizer: Tokenizer | None, *, keep_bad: bool, must_work: int
) -> list[Prompt]:
    """The prompts as messages of a user under the chat template of a checkpoint directory.

    Raises CheckpointError for a template that is missing or fails, RequestError for a prompt that it refuses; with keep_bad
    that prompt gets an `error` instead, unless it is one of the first `must_work`.
    """
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer and the model has none; give token ids")

    def one(number: int, prompt: Prompt) -> Prompt:
        if prompt.error or not prompt.text:  # an empty text is refused with the others, later
            return prompt
        try:
            return prompt._replace(token_ids=tuple(encode_chat(folder, tokenizer, [{"role": "user", "content": prompt.text}])))
        except RequestError as e:
            if not keep_bad or number < must_work:
                raise
            return prompt._replace(error=str(e))

    return [one(number, prompt) for number, prompt in enumerate(prompts)]


def read_prompts(path: str, defaults: SamplingParams, *, keep_bad: bool = False) -> list[Prompt]:
    """Reads a .txt or .jsonl file. Raises RequestError naming the line.

    keep_bad: a line that is no prompt becomes a Prompt with an `error` instead, as a long job wants it.

    Text: empty lines are skipped, the id is the number of the prompt. JSON lines: objects with `prompt`, and
    optionally `id` and any field of SamplingParams.
    """
    file = pathlib.Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028, inside JSON texts
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a NUL in the path
        raise RequestError(f"cannot read prompts from {path} ({e}); give a UTF-8 .txt or .jsonl file") from e
    if file.suffix == ".jsonl":
        prompts = [_parse_or_keep(line, number, defaults, keep_bad, file) for number, line in enumerate(lines, 1) if line.strip()]
    elif file.suffix == ".txt":
        prompts = [Prompt(number, line, defaults) for number, line in enumerate(filter(str.strip, lines))]
    else:
        raise RequestError(f"prompts file {path} ends in {file.suffix!r}; it must be .txt (one a line) or .jsonl")
    if not prompts:
        raise RequestError(f"prompts file {path} holds no prompt; give at least one")
    return prompts


def _parse_or_keep(line: str, number: int, defaults: SamplingParams, keep_bad: bool, file: pathlib.Path) -> Prompt:
    try:
        return _parse(line, number, defaults)
    except RequestError as e:
        if not keep_bad:
            raise RequestError(f"{file}: {e}") from e
        return Prompt(number - 1, "", defaults, error=str(e))


def _parse(line: str, number: int, defaults: SamplingParams) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"line {number} is not JSON ({e}); give one object a line") from e
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise RequestError(f'line {number} has no text "prompt"; give {{"prompt": "...", "id": ...}}')
    text, request_id = fields.pop("prompt"), fields.pop("id", number - 1)
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise RequestError(f"line {number} has the id {request_id!r}; it must be a text or a whole number")
    if not (_is_text(text) and _is_text(str(request_id))):
        raise RequestError(f"line {number} holds half of a surrogate pair, which is no text; write the whole character")
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    unknown = sorted(set(fields) - names)
    if unknown:
        raise RequestError(f"line {number} has the unknown field {unknown[0]!r}; known are prompt, id, {', '.join(sorted(names))}")
    if isinstance(fields.get("stop"), list):
        fields["stop"] = tuple(fields["stop"])
    if fields.get("temperature") == 0:  # greedy: what is the default of sampled requests falls away
        fields = {"top_k": 0, "top_p": 1.0} | fields
    try:
        return Prompt(request_id, text, dataclasses.replace(defaults, **fields))
    except RequestError as e:
        raise RequestError(f"line {number}: {e}") from e


def _is_text(value: str) -> bool:
    """Whether a str can be written as UTF-8; JSON escapes can spell single surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
