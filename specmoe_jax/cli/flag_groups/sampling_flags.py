"""The flags of sampling: how texts are drawn, when they end, and what is told of them."""

import pathlib
from typing import Any

from absl import flags

from specmoe_jax.checkpoints.published.generation_config import sampling_defaults
from specmoe_jax.config.sampling_params import OF_DRAWS, SamplingParams
from specmoe_jax.support.errors import RequestError

_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per request at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy. Default: what the model's generation_config asks for, else 0.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k most likely tokens; 0 is all. Default: the model's, else 0.")
_TOP_P = flags.DEFINE_float("top_p", None, "Sample within the smallest set of this probability mass. Default: the model's, else 1.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "End a request at this text; may be repeated.")
_IGNORE_EOS = flags.DEFINE_boolean("ignore_eos", False, "Go on after an end-of-sequence token.")
_MIN_P = flags.DEFINE_float(
    "min_p", None, "Drop tokens of less than this share of the best one's probability. Default: the model's, else 0."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Above 1: prompt's and answer's tokens become less likely. Default: the model's, else 1."
)
_PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", None, "Taken from the logits of tokens that the answer holds. Default: the model's, else 0."
)
_FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", None, "The same for each time that it holds them. Default: the model's, else 0."
)
_LOGIT_BIAS = flags.DEFINE_multi_string("logit_bias", [], "ID:NUMBER, added to the logit of a token; may be repeated.")
_BANNED_TOKENS = flags.DEFINE_list(
    "banned_tokens", None, "Ids of tokens that are never chosen, separated by commas. Default: the model's, else none."
)
_STOP_TOKEN_IDS = flags.DEFINE_list("stop_token_ids", [], "End a request at one of these tokens, ids separated by commas.")
_JSON_SCHEMA = flags.DEFINE_string(
    "json_schema", None, "What every answer must be: a JSON schema, or a file that holds one (needs llguidance)."
)
_REGEX = flags.DEFINE_string("regex", None, "A regular expression that every answer must match as a whole (needs llguidance).")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Records tell the log-probability of each new token, and this many of the best beside it."
)
_PROMPT_LOGPROBS = flags.DEFINE_integer("prompt_logprobs", None, "The same of the prompt's tokens but the first.")

_OF_THE_MODEL = {  # which generation_config.json may ask for, by their names
    "temperature": _TEMPERATURE, "top_k": _TOP_K, "top_p": _TOP_P, "min_p": _MIN_P, "repetition_penalty": _REPETITION_PENALTY,
    "presence_penalty": _PRESENCE_PENALTY, "frequency_penalty": _FREQUENCY_PENALTY,
}  # fmt: skip


def sampling(folder: pathlib.Path) -> dict[str, Any]:
    """The fields that generation_config.json of a checkpoint may ask for: a flag, or the model's default, or greedy."""
    given: dict[str, Any] = {name: flag.value for name, flag in _OF_THE_MODEL.items() if flag.value is not None}
    if _BANNED_TOKENS.value is not None:
        given["banned_tokens"] = tuple(_ids("banned_tokens", _BANNED_TOKENS.value))
    greedy = given.get("temperature") == 0
    wishes = sampling_defaults(folder, but=given | (OF_DRAWS if greedy else {}))
    return {"temperature": 0.0} | OF_DRAWS | wishes | given


def params(sampling: dict[str, Any]) -> SamplingParams:
    """With the fields of the other flags."""
    return SamplingParams(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        seed=_SEED.value,
        stop=tuple(_STOP.value),
        ignore_eos=_IGNORE_EOS.value,
        logit_bias=_bias(),
        stop_token_ids=tuple(_ids("stop_token_ids", _STOP_TOKEN_IDS.value)),
        logprobs=_LOGPROBS.value,
        prompt_logprobs=_PROMPT_LOGPROBS.value,
        json_schema=_schema(),
        regex=_REGEX.value,
        **sampling,
    )


def given_logprobs() -> str | None:
    """The first flag that asks for log-probabilities."""
    return next((flag.name for flag in (_LOGPROBS, _PROMPT_LOGPROBS) if flag.value is not None), None)


def _ids(name: str, values: list[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError as e:
        raise RequestError(f"--{name} is {','.join(values)!r}; give token ids, separated by commas") from e


def _schema() -> str | None:
    """The JSON text, from the flag itself or the file that it names."""
    given = _JSON_SCHEMA.value
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return pathlib.Path(given).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise RequestError(f"--json_schema is {given[:80]!r}, no JSON object and no file to read ({e}); give one of them") from e


def _bias() -> dict[int, float]:
    pairs = [entry.split(":") for entry in _LOGIT_BIAS.value]
    try:
        return {int(token): float(amount) for token, amount in pairs}
    except ValueError as e:
        raise RequestError(f"--logit_bias is {' '.join(_LOGIT_BIAS.value)!r}; give ID:NUMBER, for example 42:-3.5") from e
