"""generation_config.json: how a checkpoint wants to be sampled, and which of its wishes are not built."""

import math
import pathlib
import warnings
from collections.abc import Callable, Container
from typing import Any

from specmoe_jax.checkpoints.files import read_json
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.validation import is_whole

GENERATION_CONFIG = "generation_config.json"
_RANGES = {
    "temperature": lambda v: v >= 0, "top_k": lambda v: v >= 0 and v == int(v), "top_p": lambda v: 0 < v <= 1,
    "min_p": lambda v: 0 <= v < 1,
}  # fmt: skip
_PENALTIES = {  # of greedy texts too
    "repetition_penalty": lambda v: 0 < v <= 100, "presence_penalty": lambda v: -100 <= v <= 100,
    "frequency_penalty": lambda v: -100 <= v <= 100,
}  # fmt: skip
# What changes the text and is not built, with the values that change nothing; the second lot only where tokens are drawn.
_ALWAYS = {
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],), "sequence_bias": ({},), "forced_eos_token_id": (), "num_beams": (1,), "penalty_alpha": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "exponential_decay_length_penalty": (), "guidance_scale": (1,),
    "remove_invalid_values": (False,), "stop_strings": ([],), "watermarking_config": (), "diversity_penalty": (0,),
}  # fmt: skip
_SAMPLED = {"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": ()}


def sampling_defaults(path: pathlib.Path, *, but: Container[str] = ()) -> dict[str, Any]:
    """What generation_config.json asks for, as fields of SamplingParams. Without a temperature it is greedy. but: names that are
    not asked.

    A top_k of -1 is the whole vocabulary, as elsewhere. Warns once of what it asks for beside that. Raises CheckpointError for
    values outside their range.
    """
    raw = read_json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).exists() else {}
    if ignored := ignored_wishes(raw):
        said = ", ".join(f"{key}={value}" for key, value in ignored.items())
        warnings.warn(f"{GENERATION_CONFIG} asks for {said}, which is not built: it is ignored", stacklevel=2)
    always = _numbers(raw, _PENALTIES, but) | ({} if "banned_tokens" in but else _suppressed(raw))
    if not raw.get("do_sample", False):
        return always
    sampled = _numbers(raw, _RANGES, but)
    return always | {"temperature": 1.0} | sampled if sampled.get("temperature") != 0 else always


def _numbers(raw: dict, ranges: dict[str, Callable[[float], bool]], but: Container[str]) -> dict[str, float | int]:
    found = {}
    for name, valid in ranges.items():
        value = 0 if name == "top_k" and raw.get(name) == -1 else raw.get(name)
        if value is None or name in but:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or not valid(value):
            raise CheckpointError(f"{GENERATION_CONFIG}: {name} is {str(value)[:50]!r}; expected a number in its range")
        found[name] = int(value) if name == "top_k" else float(value)
    return found


def _suppressed(raw: dict) -> dict[str, tuple[int, ...]]:
    """Tokens that are never chosen."""
    tokens = raw.get("suppress_tokens") or []
    if not isinstance(tokens, list) or not all(is_whole(token) and token >= 0 for token in tokens):
        raise CheckpointError(f"{GENERATION_CONFIG}: suppress_tokens is {str(tokens)[:50]}; expected a list of token ids")
    return {"banned_tokens": tuple(tokens)} if tokens else {}


def ignored_wishes(raw: dict) -> dict:
    """Keys of a generation config that would change the text and are not built, with their values."""
    neutral = _ALWAYS | (_SAMPLED if raw.get("do_sample") else {})
    return {key: raw[key] for key, without in neutral.items() if raw.get(key) is not None and raw[key] not in without}
