"""Conversations under a checkpoint's own chat template, rendered as transformers renders them."""

import pathlib
from collections.abc import Sequence

from specmoe_jax.checkpoints.files import read_bytes, read_json
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config
from specmoe_jax.checkpoints.model_tokenizer import load_model_tokenizer
from specmoe_jax.checkpoints.published.jinja_environment import compile_template
from specmoe_jax.checkpoints.tokenizer import SETTINGS_FILE, Tokenizer
from specmoe_jax.models.model import Model
from specmoe_jax.support.errors import CheckpointError, RequestError

TEMPLATE_FILE, PROCESSOR_TEMPLATE, TOKENS_MAP = "chat_template.jinja", "chat_template.json", "special_tokens_map.json"
MAX_TEMPLATE_BYTES = 1 << 20
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field of a message; templates read the first two
FIXED = ("messages", "tools", "documents", "add_generation_prompt")  # what a template gets beside options


def chat_template(
    model: Model | str | pathlib.Path,
    messages: Sequence[dict],
    *,
    tools: Sequence[dict] | None = None,
    documents: Sequence[dict] | None = None,
    add_generation_prompt: bool = True,
    tokenize: bool = True,
    **options,
) -> list[int] | str:
    """Ids of a conversation for `Engine.generate`, or with tokenize=False its text.

    messages: [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}, ...]. tools: JSON schemas of functions.
    options: what the model's template asks for, such as enable_thinking or reasoning_effort. The template writes BOS itself, so the
    text is not to be given to `generate`, which adds one. Raises CheckpointError or RequestError.
    """
    path = model.path if isinstance(model, Model) else checkpoint_path(str(model))
    if path is None:
        raise RequestError("the model has no checkpoint directory, so no chat template; give token ids")
    given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    if not tokenize:
        return render_chat(path, messages, **given, **options)
    tokenizer = model.tokenizer if isinstance(model, Model) else load_model_tokenizer(path, load_config(path))
    if tokenizer is None:
        raise RequestError(f"{path}: no tokenizer.json, which makes ids of a conversation; give tokenize=False for its text")
    return encode_chat(path, tokenizer, messages, **given, **options)


def encode_chat(path: pathlib.Path, tokenizer: Tokenizer, messages: Sequence[dict], **options) -> list[int]:
    """Ids of a conversation, ready for the answer. messages: [{"role": "user", "content": "..."}, ...]; options: of render_chat.

    The template writes BOS itself, so the tokenizer adds none. Raises CheckpointError or RequestError.
    """
    return tokenizer.backend.encode(render_chat(path, messages, **options), add_special_tokens=False).ids


def render_chat(
    path: pathlib.Path,
    messages: Sequence[dict],
    *,
    tools: Sequence[dict] | None = None,
    documents: Sequence[dict] | None = None,
    add_generation_prompt: bool = True,
    **options,
) -> str:
    """The text of a conversation under the template of a checkpoint directory, in Jinja's sandbox.

    Raises CheckpointError when there is no template or it fails, RequestError when it refuses the messages.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one")
    template = compile_template(_template(path, with_tools=tools is not None))
    given = {
        "messages": [_plain(message) for message in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return template.render(**(special_tokens(path) | options | given))
    except RequestError:
        raise
    except Exception as e:  # a template is a program of someone else
        raise _failed(path, e) from None


def template_text(path: pathlib.Path) -> str:
    """The chat template of a checkpoint directory. Raises CheckpointError where there is none."""
    return _template(path, with_tools=False)


def special_tokens(path: pathlib.Path) -> dict[str, str]:
    """The special tokens that a template may name: those of tokenizer_config.json, or of the older special_tokens_map.json."""
    raw = _settings(path)
    older = read_json(path / TOKENS_MAP) if (path / TOKENS_MAP).exists() and "added_tokens_decoder" not in raw else {}
    named = [(key, value) for source in (older, raw) for key, value in source.items() if key.endswith("_token")]
    for source in (older, raw):
        for key in ("extra_special_tokens", "model_specific_special_tokens"):
            named += source[key].items() if isinstance(source.get(key), dict) else ()
    return {key: token for key, value in named if (token := _content(value)) is not None}


def _plain(message) -> dict:
    """A message as templates expect it: without what is null, its reasoning under both names."""
    if not isinstance(message, dict):
        raise RequestError(f"a message is a {type(message).__name__}; it must be an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _template(path: pathlib.Path, *, with_tools: bool) -> str:
    """The file of its own, or what the tokenizer's or the processor's config says."""
    if (path / TEMPLATE_FILE).exists():
        return read_bytes(path / TEMPLATE_FILE, max_bytes=MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    template = _settings(path).get("chat_template")
    if template is None and (path / PROCESSOR_TEMPLATE).exists():
        template = read_json(path / PROCESSOR_TEMPLATE).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("tool_use" if with_tools and "tool_use" in named else "default")
    if not isinstance(template, str):
        raise CheckpointError(f"{path.name}: no chat template in {TEMPLATE_FILE} or {SETTINGS_FILE}; give plain prompts")
    return template


def _settings(path: pathlib.Path) -> dict:
    return read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}


def _content(token) -> str | None:
    """A token as a text, or as an AddedToken."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _failed(path: pathlib.Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:120]
    return CheckpointError(f"{path.name}: the chat template fails ({type(error).__name__}: {reason})")
