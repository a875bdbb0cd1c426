"""Talks with a model in the terminal: the model's chat template, answers as they come, Ctrl-C ends an answer and not the talk.

Example:
    specmoe chat --model=DIR --preset=specmoe --temperature=0.7
Commands in the talk: /new forgets it, /undo takes the last turn back, /save FILE writes it as JSON, /quit ends.
"""

import json
import pathlib
import signal
import sys

from absl import flags

from specmoe_jax.autotune.choose import Job
from specmoe_jax.checkpoints.chat import encode_chat, template_text
from specmoe_jax.checkpoints.loader import checkpoint_path
from specmoe_jax.cli import engine_flags, sampling_flags
from specmoe_jax.cli.start import Stopped
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.requests.incremental_text import IncrementalText
from specmoe_jax.engine.service.service import Service
from specmoe_jax.support.atomic_files import write_atomically
from specmoe_jax.support.errors import RequestError, UserError

USUAL = Job(prompt_tokens=256, new_tokens=256)  # of a turn, for the planner's choice

_SYSTEM = flags.DEFINE_string("system", None, "What the model is told first.")
flags.adopt_module_key_flags(engine_flags)
flags.adopt_module_key_flags(sampling_flags)


class Talk:
    """A conversation with a service. messages: so far."""

    def __init__(self, engine: Engine, service: Service, params: SamplingParams, system: str | None):
        self._engine, self._service, self._params = engine, service, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict] = list(self._system)

    def say(self, text: str, show) -> str:
        """Shows the answer to a message piece by piece. -> why it ended. After Ctrl-C what was said until then stays in the talk.

        The turn before ends in a row that keeps its cache, so only what is new is read (not with drafts of features, nor streamed).
        Raises RequestError, after which the talk is as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        model = self._engine.model
        assert model.path is not None and model.tokenizer is not None  # checked at the start
        prompt = tuple(encode_chat(model.path, model.tokenizer, asked))
        handle = self._service.submit(prompt, self._params)
        shown, answer = IncrementalText(model, self._params.stop, prompt), ""
        before = signal.signal(signal.SIGINT, lambda *_: handle.cancel())
        try:
            for event in handle:
                show(piece := shown.push(event))
                answer += piece
        finally:
            signal.signal(signal.SIGINT, before)
        completion = handle.result()
        if completion.error:
            raise RequestError(completion.error)
        self.messages = [*asked, {"role": "assistant", "content": completion.channels.get("final", answer)}]
        return completion.finish_reason

    def undo(self) -> bool:
        """Without the last turn; whether there was one."""
        if len(self.messages) == len(self._system):
            return False
        self.messages = self.messages[:-2]
        return True

    def forget(self) -> None:
        self.messages = list(self._system)


def main() -> None:
    folder = checkpoint_path(engine_flags.MODEL.value)
    template_text(folder)  # says what is missing before a weight is read
    params = sampling_flags.params(sampling_flags.sampling(folder))
    if flag := sampling_flags.given_logprobs():
        raise RequestError(f"--{flag} has no effect in a talk, which shows text alone; leave it out")
    engine = engine_flags.load_engine(USUAL, requests=1)
    service = engine.service(max_tokens=engine_flags.MAX_TOKENS.value)
    talk = Talk(engine, service, params, _SYSTEM.value)
    print("Ctrl-C ends an answer; /new, /undo, /save FILE, /quit (or Ctrl-D).", file=sys.stderr)
    while (line := _read()) is not None:
        if line.startswith("/"):
            if not _command(talk, line):
                break
        elif line.strip():
            _turn(talk, line)
    service.close()


def _read() -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, Stopped):  # Ctrl-C where nothing is being answered
        return None


def _turn(talk: Talk, text: str) -> None:
    try:
        reason = talk.say(text, lambda piece: print(piece, end="", flush=True))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return
    note = {"length": " [cut at --max_new_tokens]", "cancelled": " [stopped]"}.get(reason, "")
    print(note, flush=True)


def _command(talk: Talk, line: str) -> bool:
    """Whether the talk goes on."""
    name, _, rest = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/new":
        talk.forget()
    elif name == "/undo" and not talk.undo():
        print("error: there is no turn to take back", file=sys.stderr)
    elif name == "/save":
        _save(talk, rest.strip())
    elif name not in ("/new", "/undo"):
        print(f"error: {name} is not known; there are /new, /undo, /save FILE and /quit", file=sys.stderr)
    return True


def _save(talk: Talk, path: str) -> None:
    if not path:
        print("error: /save needs a file; /save talk.json", file=sys.stderr)
        return
    try:
        write_atomically(path, json.dumps(talk.messages, ensure_ascii=False, indent=1) + "\n")
    except (UserError, OSError) as e:
        print(f"error: cannot write {pathlib.Path(path)} ({e})", file=sys.stderr)
