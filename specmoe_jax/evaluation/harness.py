"""An adapter for lm-evaluation-harness (0.4.13): an object for `lm_eval.simple_evaluate(model=...)`.

Texts are encoded, joined, truncated and rolled over as the harness's own `hf` model does, so that both give equal scores.
"""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from specmoe_jax.checkpoints.chat import render_chat, template_text
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.scoring.rolling import prefix_token
from specmoe_jax.engine.scoring.texts import encode_pair
from specmoe_jax.evaluation.answers import Answers
from specmoe_jax.support.errors import RequestError, UserError
from specmoe_jax.support.progress import bar

MAX_NEW_TOKENS = 256  # of a task that names none, as the harness has it
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_WITHOUT_EFFECT = {"num_beams": 1, "use_cache": True}


def harness_model(
    engine: Engine,
    *,
    answers: str | None = None,
    restart: bool = False,
    max_length: int | None = None,
    requests_at_once: int = 1024,
    progress: str | bool = "auto",
    **chat_options,
) -> Any:
    """An `lm_eval.api.model.LM` over an engine; needs the [eval] extra.

    answers: a file that keeps every answer, so that an evaluation that was interrupted goes on; restart: begins it anew.
    max_length: tokens that the model reads at most, None for its window. requests_at_once: after so many, answers are on disk;
    under expert_flow=stream each lot takes a crossing of every layer. chat_options: what the model's chat template asks for, such
    as enable_thinking.
    """
    base = _harness("lm_eval.api.model").LM
    adapter = type("EngineLM", (_EngineAdapter, base), {})
    return adapter(engine, Answers(engine, answers, restart=restart), max_length, requests_at_once, progress, chat_options)


def run_tasks(model: Any, tasks: Sequence[str | dict], *, include_path: str | None = None, **options) -> dict:
    """`lm_eval.simple_evaluate` of an adapter. include_path: a folder with task files of one's own. -> its results."""
    manager = _harness("lm_eval.tasks").TaskManager(include_path=include_path)
    return _harness("lm_eval").simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"this needs lm-evaluation-harness ({e}): pip install specmoe_jax[eval]") from e


class _EngineAdapter:
    """The three kinds of requests of the harness, and chat templates."""

    def __init__(
        self, engine: Engine, answers: Answers, max_length: int | None, at_once: int, progress: str | bool, chat_options: dict
    ):
        super().__init__()
        model, window = engine.model, engine.model.config.max_positions
        if model.tokenizer is None:
            raise RequestError("the harness works on texts and the model has no tokenizer; load one that has")
        if model.config.encoder is not None:
            raise RequestError("the adapter is built for decoders alone; score an encoder-decoder by Engine.score")
        if max_length is not None and not 2 <= max_length <= window:
            raise RequestError(f"max_length is {max_length}; it must be 2 to {window}, the model's window")
        self._engine, self._tokenizer, self._answers = engine, model.tokenizer, answers
        self._at_once, self._progress, self._chat_options = at_once, progress, chat_options
        self.max_length, self.prefix_token_id = max_length or window, prefix_token(model)
        self._prefix_text = model.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]

        def ask(some: list[int]) -> list[list]:
            scores = self._engine.score([pairs[number] for number in some])
            return [[score.sum, score.is_greedy] for score in scores]

        return [(total, greedy) for total, greedy in self._asked("loglikelihood", pairs, ask)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [self._encode(request.args[0]) for request in requests]

        def ask(some: list[int]) -> list[float]:
            how = {"prefix": self.prefix_token_id, "window": self.max_length}
            return [score.sum for score in self._engine.score_rolling([texts[number] for number in some], **how)]

        return self._asked("loglikelihood_rolling", [[ids, self.max_length] for ids in texts], ask)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = [(context, sampling_of(options)) for context, options in (request.args for request in requests)]
        prompts = [self._encode(context)[-max(self.max_length - params.max_new_tokens, 1) :] for context, params in asked]

        def ask(some: list[int]) -> list[str]:
            texts = {}
            params = [asked[number][1] for number in some]
            for event in self._engine.stream([prompts[number] for number in some], params, ids=some):
                if event.completion is not None:
                    texts[event.id] = event.completion.text
            return [texts[number] for number in some]

        numbered = [[number, ids, repr(asked[number][1])] for number, ids in enumerate(prompts)]  # draws are keyed by the number
        return self._asked("generate_until", numbered, ask)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return render_chat(self._path, chat_history, add_generation_prompt=add_generation_prompt, **self._chat_options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness identifies a template by."""
        if isinstance(chat_template, str):
            raise RequestError(f"the chat template {chat_template!r} cannot be chosen; the checkpoint's own is used")
        return template_text(self._path) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self._path).replace("/", "__")

    @property
    def _path(self):
        if self._engine.model.path is None:
            raise RequestError("the model has no checkpoint directory, so no chat template; evaluate without one")
        return self._engine.model.path

    def _asked(self, kind: str, questions: list, ask) -> list:
        with bar(kind, len(questions), "request", mode=self._progress) as shown:
            return self._answers.of(kind, questions, ask, self._at_once, shown)

    def _encode(self, text: str) -> list[int]:
        """A text that begins with BOS, as those of chat templates do, gets no second one."""
        return self._tokenizer.encode(text, add_special_tokens=not (self._prefix_text and text.startswith(self._prefix_text)))

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            ids, scored = encode_pair(self._encode, context, continuation)
        else:
            scored = self._tokenizer.encode(continuation, add_special_tokens=False)
            begins = scored[:1] == [self.prefix_token_id]
            ids, scored = (scored[:1], scored[1:]) if begins else ([self.prefix_token_id], scored)
        room = self.max_length + 1 - len(scored)  # the last token is not read
        if room < 1:
            raise RequestError(f"a continuation of {len(scored)} tokens does not fit into max_length={self.max_length}")
        if len(ids) > room:
            warnings.warn(f"a context of {len(ids)} tokens is cut to its last {room}", RuntimeWarning, stacklevel=2)
        return (ids or [self.prefix_token_id])[-room:], scored


def sampling_of(options: dict) -> SamplingParams:
    """The generation arguments of a task. Raises RequestError for one that is not built."""
    options = dict(options)
    until, drawn = options.pop("until", None) or (), options.pop("do_sample", None)
    limits = [int(options.pop(name)) for name in _LIMITS if name in options]
    temperature = 0.0 if drawn is False else float(options.pop("temperature", 1.0 if drawn else 0.0))
    options.pop("temperature", None)
    given = {name: options.pop(name) for name in _SAMPLING if name in options}
    if unknown := sorted(name for name, value in options.items() if _WITHOUT_EFFECT.get(name) != value):
        raise RequestError(f"the task asks for {unknown[0]}={options[unknown[0]]!r} in generation, which is not built")
    if temperature == 0:
        given = {name: value for name, value in given.items() if name not in ("top_k", "top_p", "min_p")}
    return SamplingParams(
        max_new_tokens=limits[0] if limits else MAX_NEW_TOKENS,
        temperature=temperature,
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        **given,
    )
