"""How requests are sampled."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_number, is_text, is_whole, plain, shown

OF_DRAWS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # what greedy requests have no use for, at its neutral values
MOST_LOGPROBS = 1000  # beside each token: more would make records of megabytes


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Temperature 0 is greedy.

    The order: logit_bias, repetition_penalty, presence and frequency penalty, banned_tokens, logits_processor, the grammar; then,
    unless greedy, temperature, top_k, top_p, min_p. All of it is done to drafted tokens and to the target alike, so speculation
    changes nothing.

    min_p: drops tokens of less than min_p times the probability of the most likely one. repetition_penalty: divides the positive
    and multiplies the negative logits of all tokens of prompt and answer so far. presence_penalty, frequency_penalty: are taken
    from the logits of the answer's tokens, once and for each time. logit_bias: token id -> what is added to its logit; a mapping,
    kept as sorted pairs. banned_tokens: ids that are never chosen. logits_processor: a pure function (ids [S] int32, logits [V]
    float32) -> logits [V] that JAX can trace, called for every position with the tokens of prompt and answer before it, -1 beyond.
    json_schema, regex: what the whole answer must be, one of the two: a JSON schema (a mapping, kept as its JSON text) or a regular
    expression. Only tokens that can lead there are chosen, and the end of sequence only where it is reached; an answer that
    max_new_tokens cuts before ends with "length" (docs/structured.md).
    stop_token_ids: ids that end a request, as an end of sequence does.
    logprobs: log-probability of each new token under the model's own distribution (before all of the above), and of the k best
    beside it; None for none. prompt_logprobs: the same of the prompt's tokens but the first.

    Raises RequestError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0 = whole vocabulary
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned_tokens: tuple[int, ...] = ()
    logits_processor: Callable | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if not is_whole(self.max_new_tokens) or not 1 <= self.max_new_tokens < 1 << 31:
            said = "a whole number of at least 1, at most 2147483647"
            raise RequestError(f"max_new_tokens is {shown(self.max_new_tokens)}; it must be {said}")
        if not is_number(self.temperature) or self.temperature < 0:
            raise RequestError(f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or more, and finite")
        if not is_whole(self.top_k) or not 0 <= self.top_k < 1 << 31:
            raise RequestError(f"top_k is {shown(self.top_k)}; it must be a whole number, 0 (whole vocabulary) or more")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {shown(self.top_p)}; it must be in (0, 1]")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 32:
            raise RequestError(f"seed is {shown(self.seed)}; it must be a whole number from 0 to {(1 << 32) - 1}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s and is_text(s) for s in self.stop):
            raise RequestError(f"stop is {self.stop!r}; it must be a tuple of texts of at least one character each")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if not is_number(self.min_p) or not 0 <= self.min_p < 1:
            raise RequestError(f"min_p is {self.min_p!r}; it must be in [0, 1)")
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1.0):
            raise RequestError("top_k and top_p have no effect at temperature 0; set a temperature or leave them out")
        if self.temperature == 0 and self.min_p != 0:
            raise RequestError("min_p has no effect at temperature 0; set a temperature or leave it out")
        self._check_edits()
        self._check_grammar()
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and (not is_whole(count) or not 0 <= count <= MOST_LOGPROBS):
                raise RequestError(f"{name} is {count!r}; it must be a whole number from 0 to {MOST_LOGPROBS}, or none")

    def _check_edits(self) -> None:
        """What is done to logits before they are a distribution."""
        if not is_number(self.repetition_penalty) or not 0 < self.repetition_penalty <= 100:
            raise RequestError(f"repetition_penalty is {self.repetition_penalty!r}; it must be above 0 and at most 100 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not is_number(getattr(self, name)) or not -100 <= getattr(self, name) <= 100:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be a number from -100 to 100 (0: none)")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        for name in ("banned_tokens", "stop_token_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or not all(is_whole(token) and token >= 0 for token in ids):
                raise RequestError(f"{name} is {str(ids)[:50]}; it must be a tuple of token ids")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise RequestError(
                f"logits_processor is a {type(self.logits_processor).__name__}; give a function (ids, logits) -> logits"
            )

    def _check_grammar(self) -> None:
        """What an answer must be."""
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.regex is not None and not (isinstance(self.regex, str) and is_text(self.regex)):
            raise RequestError(f"regex is {shown(self.regex)}; it must be a regular expression, as a text")
        if self.json_schema is not None and self.regex is not None:
            raise RequestError("both json_schema and regex are given; leave one out")
        if self.grammar and self.ignore_eos:
            raise RequestError(f"ignore_eos and {self.grammar[0]} exclude each other: the end of the answer is an end of sequence")

    @property
    def grammar(self) -> tuple[str, str] | None:
        """The field that says what the answer must be, and its text."""
        if self.regex is not None:
            return "regex", self.regex
        assert not isinstance(self.json_schema, Mapping)
        return None if self.json_schema is None else ("json_schema", self.json_schema)

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """logit_bias as it is kept."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def penalised(self) -> bool:
        """Whether a logit depends on the tokens before it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _bias_pairs(bias) -> tuple[tuple[int, float], ...]:
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        pairs = sorted((token, amount) for token, amount in pairs)
    except (TypeError, ValueError):
        pairs = [(-1, 0.0)]
    if not all(is_whole(token) and token >= 0 and is_number(amount) and abs(amount) <= 1e6 for token, amount in pairs):
        raise RequestError(f"logit_bias is {str(bias)[:50]}; it must map token ids to finite numbers")
    if len({token for token, _ in pairs}) != len(pairs):
        raise RequestError("logit_bias names a token twice; give each once")
    return tuple((token, float(amount)) for token, amount in pairs)


def _schema_text(schema) -> str | None:
    """A JSON schema as the text that it is kept as, its properties in their order."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if value is None and schema is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError("it is no object")
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise RequestError(f"json_schema is {str(schema)[:50]!r} ({str(e)[:80]}); it must be a JSON object, or its text") from None
