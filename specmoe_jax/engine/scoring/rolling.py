"""Texts that are longer than what is read at a time: windows that score every token once."""

from collections.abc import Callable, Iterator, Sequence

from specmoe_jax.engine.requests.prepare import Reader
from specmoe_jax.engine.scoring.score import Score
from specmoe_jax.engine.scoring.texts import Text
from specmoe_jax.support.errors import RequestError


def score_rolling(
    model: Reader,
    texts: Sequence[Text],
    score: Callable[[list], list[Score]],
    *,
    prefix: int | None,
    window: int | None,
    overlap: int,
) -> list[Score]:
    """See Engine.score_rolling. score: Engine.score, called once with the windows of all texts."""
    if isinstance(texts, str) or len(texts) == 0:
        raise RequestError("texts is empty or one text; give a list of texts (or of token-id lists), of at least one")
    if model.config.encoder is not None:
        raise RequestError("an encoder-decoder scores a text given another one alone; use score with (context, continuation)")
    window = model.config.max_positions if window is None else window
    if not 1 <= window <= model.config.max_positions:
        raise RequestError(f"window is {window}; it must be 1 to {model.config.max_positions}, the model's")
    windows, owners = [], []
    for number, text in enumerate(texts):
        ids = _ids(model, number, text)
        first = prefix_token(model) if prefix is None else prefix
        own = list(rolling_windows(ids, first, window, overlap))
        windows, owners = windows + own, owners + [number] * len(own)
    parts: list[list[Score]] = [[] for _ in texts]
    for number, part in zip(owners, score(windows), strict=True):
        parts[number].append(part)
    return [_joined(own) for own in parts]


def prefix_token(model: Reader) -> int:
    """What the first token of a text is given: BOS where the tokenizer has one, or else an end token."""
    begin = None if model.tokenizer is None else model.tokenizer.bos_token_id
    ends = model.config.eos_token_ids
    if begin is None and not ends:
        raise RequestError("the model has neither BOS nor an end token to begin a text with; give prefix")
    return ends[0] if begin is None else begin


def _ids(model: Reader, number: int, text: Text) -> Sequence[int]:
    """Of a text without what the tokenizer puts around it: the prefix stands there."""
    if isinstance(text, str):
        if model.tokenizer is None:
            raise RequestError(f"text {number} needs a tokenizer and the model has none; give token ids")
        ids = model.tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = list(text)
    if not ids:
        raise RequestError(f"text {number} is empty; give at least one token")
    return ids


def _joined(parts: list[Score]) -> Score:
    return Score(
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        is_greedy=all(part.is_greedy for part in parts),
    )


def rolling_windows(
    ids: Sequence[int], prefix: int, window: int, overlap: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) pairs that score each token of a long text once, the first given `prefix` alone.

    A window reads at most `window` tokens. Each but the first sees at least `overlap` tokens more than it needs to begin; the last
    one looks back as far as it can.

    >>> list(rolling_windows([1, 2, 3, 4, 5], prefix=0, window=3, overlap=1))
    [((0,), (1, 2, 3)), ((2, 3), (4, 5))]
    """
    if not 0 <= overlap < window:
        raise RequestError(f"overlap is {overlap} and window {window}; overlap must be 0 or more and below window")
    text, done = (prefix, *ids), 0
    while done < len(ids):
        end = min(len(ids), done + (window - overlap if done else window))
        yield text[max(end - window, 0) : done + 1], text[done + 1 : end + 1]
        done = end
