"""Jinja as templates of published checkpoints expect it: what transformers gives them, in the same sandbox."""

import datetime
import json

from specmoe_jax.support.errors import CheckpointError, RequestError


def compile_template(source: str):
    """A template that can be rendered. Raises CheckpointError for one that is none, RequestError without jinja2."""
    try:
        return _environment().from_string(source)
    except RequestError:
        raise
    except Exception as e:  # whatever a broken template makes of the parser
        reason = " ".join(str(e).split())[:120]
        raise CheckpointError(f"the chat template fails ({type(e).__name__}: {reason})") from None


def _environment():
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise RequestError("a chat template needs jinja2; install it: pip install specmoe_jax[chat]") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the answers, which training asks for; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [loopcontrols, Generation]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message):
    raise RequestError(f"the chat template refuses this conversation: {' '.join(str(message).split())[:200]}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without Jinja's own escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
