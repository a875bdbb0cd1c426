"""Pairs of context and continuation -> token ids that can be scored, or an error that names the pair."""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

from specmoe_jax.engine.requests.prepare import Reader
from specmoe_jax.support.errors import RequestError

Text = str | Sequence[int]


class ScoredText(NamedTuple):
    """The continuation is scored given the context; both have at least one token. source: what an encoder reads, () without one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    source: tuple[int, ...] = ()


def scored_texts(model: Reader, pairs: Sequence[tuple[Text, Text]]) -> list[ScoredText]:
    """Raises RequestError. A pair is of two texts or of two lists of token ids; an encoder reads the context where there is one."""
    if isinstance(pairs, str) or len(pairs) == 0:
        raise RequestError("pairs is empty or a text; give a list of (context, continuation), of at least one")
    return [_scored_text(model, number, pair) for number, pair in enumerate(pairs)]


def _scored_text(model: Reader, number: int, pair: tuple[Text, Text]) -> ScoredText:
    if isinstance(pair, str) or len(pair) != 2 or isinstance(pair[0], str) != isinstance(pair[1], str):
        raise RequestError(f"pair {number} is not (context, continuation); give two texts, or two lists of token ids")
    context, continuation = (_token_ids(number, part, model.config.vocab_size) for part in _encoded(model, number, pair))
    if not context or not continuation:
        part = "continuation" if context else "context"
        raise RequestError(f"pair {number} has an empty {part}; give at least one token of each (a context may be BOS alone)")
    window, encoder = model.config.max_positions, model.config.encoder
    read = len(continuation) - 1 + (len(context) if encoder is None else len(encoder.start))
    if max(read, len(context)) > window:
        raise RequestError(
            f"pair {number} has {max(read, len(context))} tokens to read and the model's window is {window}; shorten it"
        )
    return ScoredText(context, continuation) if encoder is None else ScoredText(encoder.start, continuation, source=context)


def _encoded(model: Reader, number: int, pair: tuple[Text, Text]) -> tuple[Sequence[int], Sequence[int]]:
    """Texts as ids, ids as they are."""
    context, continuation = pair
    if isinstance(context, str) and isinstance(continuation, str):
        if model.tokenizer is None:
            raise RequestError(f"pair {number} needs a tokenizer and the model has none; give token ids")
        encode = model.tokenizer.encode
        joined = model.config.encoder is None
        return encode_pair(encode, context, continuation) if joined else (encode(context), encode(continuation))
    assert not isinstance(context, str) and not isinstance(continuation, str)  # both are of one kind
    return context, continuation


def _token_ids(number: int, ids: Sequence[int], vocab: int) -> tuple[int, ...]:
    try:
        numbers = tuple(operator.index(token) for token in ids)
    except TypeError as e:
        raise RequestError(f"pair {number} holds neither texts nor lists of token ids ({e}); give pairs of either") from e
    if not all(0 <= token < vocab for token in numbers):
        raise RequestError(f"pair {number} holds a token id outside 0..{vocab - 1}, the model's vocabulary")
    return numbers


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both. The space between them belongs to the continuation, and both are encoded as one text.

    The rule of lm-evaluation-harness, so that scores can be compared.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    begin = encode(context)
    return begin, encode(context + continuation)[len(begin) :]
