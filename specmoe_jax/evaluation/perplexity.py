"""Perplexity of a text, without a harness."""

import math
from typing import NamedTuple

from specmoe_jax.engine.engine import Engine
from specmoe_jax.support.timing import Stopwatch


class Perplexity(NamedTuple):
    """nats: the negative log-likelihood of the whole text. words: separated by white space. seconds: of scoring it."""

    tokens: int
    words: int
    utf8_bytes: int
    nats: float
    seconds: float

    @property
    def per_token(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """Of tokenizers that differ, this can be compared."""
        return math.exp(self.nats / max(self.words, 1))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.utf8_bytes

    def to_dict(self) -> dict:
        """With the ratios, units in the names."""
        return self._asdict() | {
            "perplexity_per_token": self.per_token,
            "perplexity_per_word": self.per_word,
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_s": self.tokens / self.seconds,
        }


def perplexity(engine: Engine, text: str, *, window: int | None = None, overlap: int = 0) -> Perplexity:
    """Of a text of any length, in windows. window, overlap: as of Engine.score_rolling. Raises RequestError."""
    watch = Stopwatch()
    (score,) = engine.score_rolling([text], window=window, overlap=overlap)
    return Perplexity(
        tokens=len(score.token_ids),
        words=len(text.split()),
        utf8_bytes=len(text.encode()),
        nats=-score.sum,
        seconds=watch.seconds,
    )
