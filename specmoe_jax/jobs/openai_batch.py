"""The OpenAI batch form of a job: a request a line with custom_id, method, url and body, and answers in the form of responses."""

import time
from typing import Any, NamedTuple

from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.support.errors import RequestError

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
LINE_FIELDS = {"custom_id", "method", "url", "body"}
_NO_EFFECT_ON_TEXT = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
_ONLY = {  # parameters of which one value is built
    "n": 1, "stream": False, "logprobs": (False, None), "top_logprobs": None,
    "tool_choice": ("auto", None), "best_of": 1, "echo": False, "suffix": None, "modalities": ["text"],
    "prompt_logprobs": None,
}  # fmt: skip
_MAY_BE_NULL = {"presence_penalty", "frequency_penalty", "logit_bias"}
_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


class BatchRequest(NamedTuple):
    """What of a line the answer repeats."""

    custom_id: str
    url: str
    model: str | None


def is_batch_line(fields: dict) -> bool:
    """Whether a JSON line is in this form."""
    return "custom_id" in fields and "body" in fields


def read_line(fields: dict, where: str) -> tuple[BatchRequest, dict[str, Any]]:
    """The request, and its body as the fields of a prompt line. Raises RequestError. where: the line, for messages."""
    if unknown := sorted(set(fields) - LINE_FIELDS):
        raise RequestError(f"{where} has the unknown field {unknown[0]!r}; a batch line has {', '.join(sorted(LINE_FIELDS))}")
    body, url = fields["body"], fields.get("url", CHAT_URL)
    if not isinstance(fields["custom_id"], str) or not isinstance(body, dict):
        raise RequestError(f"{where}: custom_id must be a text and body an object")
    if fields.get("method", "POST") != "POST" or url not in (CHAT_URL, TEXT_URL):
        raise RequestError(f"{where} asks for {fields.get('method')} {url!r}; built are POST {CHAT_URL} and {TEXT_URL}")
    wanted = "messages" if url == CHAT_URL else "prompt"
    if wanted not in body:
        raise RequestError(f"{where}: body has no {wanted}, which {url} needs")
    own: dict[str, Any] = {"id": fields["custom_id"]}
    for key, value in body.items():
        if key in _ONLY:
            _require(key, value, where)
        elif key == "response_format":
            own |= _form_at(where, value)
        elif key not in _NO_EFFECT_ON_TEXT | {"model"} and not (value is None and key in _MAY_BE_NULL):
            own[_RENAMED.get(key, key)] = (value,) if key == "stop" and isinstance(value, str) else value
    return _request(fields), own


def _form_at(where: str, value: Any) -> dict[str, Any]:
    try:
        return answer_form(value)
    except RequestError as e:
        raise RequestError(f"{where}: {e}") from e


def answer_form(value: Any) -> dict[str, Any]:
    """response_format as fields of SamplingParams. Raises RequestError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if value is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    given = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        said = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise RequestError(f"response_format is {str(value)[:80]}; give {said}")
    return {"json_schema": given["schema"]}


def request_of(fields: Any) -> BatchRequest | None:
    """What an answer repeats to a line that cannot be served; None of a line that is not in this form."""
    return _request(fields) if isinstance(fields, dict) and is_batch_line(fields) else None


def _request(fields: dict) -> BatchRequest:
    model = fields["body"].get("model") if isinstance(fields["body"], dict) else None
    url = TEXT_URL if fields.get("url") == TEXT_URL else CHAT_URL
    return BatchRequest(str(fields["custom_id"]), url, model if isinstance(model, str) else None)


def response(index: int, request: BatchRequest, completion: Completion) -> dict:
    """A line of the answers."""
    name = f"batch_req_{index}"
    body = _error(completion.error) if completion.error else _answer(index, request, completion)
    status = 200 if completion.error is None else 500 if completion.token_ids else 400
    answer = {"status_code": status, "request_id": name, "body": body}
    return {"id": name, "custom_id": request.custom_id, "response": answer, "error": None, "index": index}


def _require(key: str, value, where: str) -> None:
    built = _ONLY[key] if isinstance(_ONLY[key], tuple) else (_ONLY[key],)
    if value not in built:
        raise RequestError(f"{where}: {key} is {value!r}; built is {built[0]!r} alone")


def _answer(index: int, request: BatchRequest, completion: Completion) -> dict:
    new, prompt = len(completion.token_ids), completion.num_prompt_tokens
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    chat = request.url == CHAT_URL
    choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason, "logprobs": None}
    choice |= {"message": _message(completion)} if chat else {"text": completion.text}
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{index}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage,
    }


def _message(completion: Completion) -> dict:
    """The answer; of a model with channels the final one, and what it thought beside it."""
    channels = completion.channels
    message = {"role": "assistant", "content": channels.get("final", "") if channels else completion.text}
    return message | ({"reasoning_content": channels["analysis"]} if "analysis" in channels else {})


def _error(message: str) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error"}}
