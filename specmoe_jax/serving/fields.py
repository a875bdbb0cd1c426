"""The fields of a request: one table that says what each becomes. A field that is not in it is refused by name."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from specmoe_jax.config.sampling_params import OF_DRAWS, SamplingParams
from specmoe_jax.jobs.openai_batch import answer_form
from specmoe_jax.serving.errors import ApiError
from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_text, is_whole, shown

CHAT, TEXT = "chat", "text"
BOTH = (CHAT, TEXT)
MOST_STOPS, MOST_TOP_LOGPROBS = 16, 20
TEXT_TOKENS = 16  # of a completion where nothing is said, as in the API


class Ask(NamedTuple):
    """A request as it was read. prompts: texts or token ids, of a completion; messages: of a chat.

    max_tokens: None for as many as there is room for. sampling: fields of SamplingParams. count: answers to each prompt. template:
    options of the chat template.
    """

    form: str
    model: str | None
    messages: tuple[dict, ...]
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    sampling: dict[str, Any]
    count: int
    stream: bool
    usage: bool
    template: dict[str, Any]


class Field(NamedTuple):
    """forms: of the requests that have it. read: (name, value) -> entries of what is read, the value not being null."""

    forms: tuple[str, ...]
    read: Callable[[str, Any], dict[str, Any]]


def _wrong(name: str, value, expected: str) -> ApiError:
    return ApiError(400, f"{name} is {shown(value)}; it must be {expected}", param=name, code="invalid_value")


def _as_it_is(name: str, value) -> dict:
    """A field of SamplingParams, which checks it."""
    return {name: value}


def _ids(name: str, value) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value}


def _switch(name: str, value) -> dict:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return {name: value}


def _text(name: str, value) -> dict:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return {name: value}


def _at_least_one(key: str) -> Callable[[str, Any], dict]:
    """A whole number, read as this entry."""

    def read(name: str, value) -> dict:
        if not is_whole(value) or value < 1:
            raise _wrong(name, value, "a whole number of at least 1")
        return {key: value}

    return read


def _stop(name: str, value) -> dict:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong(name, value, f"a text, or a list of at most {MOST_STOPS} texts, none of them empty")
    return {"stop": tuple(stops)}


def _bias(name: str, value) -> dict:
    try:
        return {name: {int(token): amount for token, amount in value.items()}}
    except (AttributeError, ValueError):
        raise _wrong(name, value, "an object of token ids and numbers") from None


def _logprobs_switch(name: str, value) -> dict:
    return {"logprobs": 0} if _switch(name, value)[name] else {}


def _logprobs_count(name: str, value) -> dict:
    if not is_whole(value) or not 0 <= value <= MOST_TOP_LOGPROBS:
        raise _wrong(name, value, f"a whole number from 0 to {MOST_TOP_LOGPROBS}")
    return {name: value}


def _stream_options(name: str, value) -> dict:
    if not isinstance(value, dict) or set(value) - {"include_usage"} or not isinstance(value.get("include_usage", False), bool):
        raise _wrong(name, value, 'an object with "include_usage", true or false')
    return {"usage": value.get("include_usage", False)}


def _messages(name: str, value) -> dict:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) and "role" in one for one in value):
        raise _wrong(name, value, "a list of at least one message, objects with role and content")
    return {name: tuple(_message(number, one) for number, one in enumerate(value))}


def _message(number: int, message: dict) -> dict:
    """With the parts of its content joined, which are texts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError(400, f"messages[{number}].content has a part that is no text; only texts are read", param="messages")
        return message | {"content": "".join(part for part in parts if part)}
    return message


def _prompts(name: str, value) -> dict:
    """A text, token ids, or a list of either."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(is_whole, value))):
        value = [value]
    prompts = [tuple(one) if isinstance(one, list) else one for one in value] if isinstance(value, list) else []
    for one in prompts:
        if not (isinstance(one, str) and one) and not (isinstance(one, tuple) and one and all(map(is_whole, one))):
            prompts = []
            break
    if not prompts:
        raise _wrong(name, value, "a text, a list of token ids, or a list of either, none of them empty")
    return {"prompts": tuple(prompts)}


def _template_options(name: str, value) -> dict:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return {"template": value}


def _only(*built) -> Callable[[str, Any], dict]:
    """A field of which some values are built; none of them changes anything."""

    def read(name: str, value) -> dict:
        if value not in built:
            said = f"built is {' or '.join(map(shown, built))} alone" if built else "it is not built; leave it out"
            raise ApiError(400, f"{name} is {shown(value)}; {said}", param=name, code="unsupported_parameter")
        return {}

    return read


def _answer_form(name: str, value) -> dict:
    try:
        return answer_form(value)
    except RequestError as e:
        raise ApiError(400, str(e), param=name, code="invalid_value") from None


def _no_effect(name: str, value) -> dict:
    """What the API has for its own books."""
    return {}


# A field that is null is as if it were left out.
FIELDS: dict[str, Field] = {
    "model": Field(BOTH, _text),
    "messages": Field((CHAT,), _messages),
    "prompt": Field((TEXT,), _prompts),
    "max_tokens": Field(BOTH, _at_least_one("max_tokens")),
    "max_completion_tokens": Field((CHAT,), _at_least_one("max_tokens")),
    "temperature": Field(BOTH, _as_it_is),
    "top_p": Field(BOTH, _as_it_is),
    "top_k": Field(BOTH, _as_it_is),
    "min_p": Field(BOTH, _as_it_is),
    "seed": Field(BOTH, _as_it_is),
    "presence_penalty": Field(BOTH, _as_it_is),
    "frequency_penalty": Field(BOTH, _as_it_is),
    "repetition_penalty": Field(BOTH, _as_it_is),
    "ignore_eos": Field(BOTH, _as_it_is),
    "stop": Field(BOTH, _stop),
    "stop_token_ids": Field(BOTH, _ids),
    "banned_tokens": Field(BOTH, _ids),
    "logit_bias": Field(BOTH, _bias),
    "n": Field(BOTH, _at_least_one("count")),
    "stream": Field(BOTH, _switch),
    "stream_options": Field(BOTH, _stream_options),
    "top_logprobs": Field((CHAT,), _logprobs_count),
    "chat_template_kwargs": Field((CHAT,), _template_options),
    "response_format": Field(BOTH, _answer_form),
    "regex": Field(BOTH, _as_it_is),
    "modalities": Field((CHAT,), _only(["text"])),
    "tools": Field((CHAT,), _only([])),
    "tool_choice": Field((CHAT,), _only("none")),
    "best_of": Field((TEXT,), _only(1)),
    "echo": Field((TEXT,), _only(False)),
    "suffix": Field((TEXT,), _only()),
    "store": Field(BOTH, _only(False)),
} | {name: Field(BOTH, _no_effect) for name in ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")}
_LOGPROBS = {CHAT: _logprobs_switch, TEXT: _logprobs_count}  # one name, two meanings


def read_ask(form: str, body: Any) -> Ask:
    """A request body of one of the forms. Raises ApiError that names the field."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}; it must be a JSON object")
    found: dict[str, Any] = {}
    for name, value in body.items():
        if name != "logprobs" and (name not in FIELDS or form not in FIELDS[name].forms):
            said = f"the field {name!r} is not known here; known are {', '.join(known_fields(form))}"
            raise ApiError(400, said, param=name, code="unknown_parameter")
        if value is not None:
            read = _LOGPROBS[form] if name == "logprobs" else FIELDS[name].read
            _take(found, name, read(name, value))
    if "top_logprobs" in found:
        if "logprobs" not in found:
            raise ApiError(400, "top_logprobs has no effect without logprobs=true", param="top_logprobs")
        found["logprobs"] = found.pop("top_logprobs")
    wanted = {CHAT: "messages", TEXT: "prompts"}[form]
    if wanted not in found:
        name = wanted.removesuffix("s") if form == TEXT else wanted
        raise ApiError(400, f"{name} is missing; give it", param=name, code="missing_required_parameter")
    if found.get("usage") and not found.get("stream"):
        raise ApiError(400, "stream_options has no effect without stream=true", param="stream_options")
    own = {key: found.pop(key) for key in set(found) & set(Ask._fields)}
    return Ask(
        form=form,
        model=own.get("model"),
        messages=own.get("messages", ()),
        prompts=own.get("prompts", ()),
        max_tokens=own.get("max_tokens", TEXT_TOKENS if form == TEXT else None),
        sampling=found,
        count=own.get("count", 1),
        stream=own.get("stream", False),
        usage=own.get("usage", False),
        template=own.get("template", {}),
    )


def known_fields(form: str) -> list[str]:
    return sorted([*(name for name, field in FIELDS.items() if form in field.forms), "logprobs"])


def _take(found: dict, name: str, entries: dict) -> None:
    for key, value in entries.items():
        if key in found and found[key] != value:
            raise ApiError(400, f"{name} says {value!r} and another field {found[key]!r}; give one of them", param=name)
        found[key] = value


def sampling_params(ask: Ask, defaults: Mapping[str, Any], max_new_tokens: int) -> SamplingParams:
    """Of a request. defaults: of the model, over temperature 1 as in the API; a request without a seed draws one."""
    given: dict[str, Any] = {"temperature": 1.0} | dict(defaults) | {"seed": secrets.randbits(32)} | ask.sampling
    if given["temperature"] == 0:  # what the model likes of sampled requests falls away
        given = {name: value for name, value in given.items() if name not in OF_DRAWS or name in ask.sampling}
    try:
        return SamplingParams(max_new_tokens=max_new_tokens, **given)
    except RequestError as e:
        named = sorted((str(e).find(name), name) for name in ask.sampling if name in str(e))
        raise ApiError(400, str(e), param=named[0][1] if named else None, code="invalid_value") from None


def check_text(text: str, name: str) -> str:
    """Raises ApiError for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    if not is_text(text):
        raise ApiError(400, f"{name} holds half of a surrogate pair, which is no text; write the whole character", param=name)
    return text
