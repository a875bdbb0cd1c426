"""Chat templates and sampling defaults: what a checkpoint says about how it wants to be spoken to."""

import datetime
import json
import math
import pathlib
from collections.abc import Sequence

from specmoe_jax.checkpoints.files import read_bytes, read_json
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.support.errors import CheckpointError, RequestError

TEMPLATE_FILE, TOKENIZER_CONFIG, GENERATION_CONFIG = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
MAX_TEMPLATE_BYTES = 1 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def encode_chat(path: pathlib.Path, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the answer. messages: [{"role": "user", "content": "..."}, ...].

    The template writes BOS itself, so the tokenizer adds none. Raises CheckpointError or RequestError.
    """
    return tokenizer.backend.encode(render_chat(path, messages), add_special_tokens=False).ids


def render_chat(path: pathlib.Path, messages: Sequence[dict[str, str]]) -> str:
    """The text of a conversation under the template of a checkpoint directory, in Jinja's sandbox.

    Raises CheckpointError when there is no template or it fails, RequestError when it refuses the messages.
    """
    template, tokens = _template(path)
    environment = _environment()
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=True, **tokens)
    except RequestError:
        raise
    except Exception as e:  # a template is a program of someone else
        reason = " ".join(str(e).split())[:120]
        raise CheckpointError(f"{path.name}: the chat template fails ({type(e).__name__}: {reason})") from None


def sampling_defaults(path: pathlib.Path) -> dict[str, float | int]:
    """What generation_config.json asks for: any of temperature, top_k and top_p; {} means greedy.

    Raises CheckpointError for values outside their range.
    """
    file = path / GENERATION_CONFIG
    if not file.exists():
        return {}
    raw = read_json(file)
    if not raw.get("do_sample", False):
        return {}
    ranges = {"temperature": lambda v: v >= 0, "top_k": lambda v: v >= 0 and v == int(v), "top_p": lambda v: 0 < v <= 1}
    defaults = {}
    for name, valid in ranges.items():
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or not valid(value):
            raise CheckpointError(f"{GENERATION_CONFIG}: {name} is {str(value)[:50]!r}; expected a number in its range")
        defaults[name] = int(value) if name == "top_k" else float(value)
    return {"temperature": 1.0} | defaults if defaults.get("temperature") != 0 else {}


def _template(path: pathlib.Path) -> tuple[str, dict[str, str]]:
    """(template, the special tokens that it may name)."""
    raw = read_json(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).exists() else {}
    tokens = {name: _content(raw.get(name)) for name in SPECIAL_TOKENS}
    template = raw.get("chat_template")
    if (path / TEMPLATE_FILE).exists():
        template = read_bytes(path / TEMPLATE_FILE, max_bytes=MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(f"{path.name}: no chat template in {TEMPLATE_FILE} or {TOKENIZER_CONFIG}; give plain prompts")
    return template, {name: token for name, token in tokens.items() if token is not None}


def _content(token) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _environment():
    """Jinja as templates of published checkpoints expect it: what transformers gives them, in the same sandbox."""
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise RequestError("a chat template needs jinja2; install it: pip install jinja2") from None

    def refuse(message):
        raise RequestError(f"the chat template refuses this conversation: {' '.join(str(message).split())[:200]}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment
