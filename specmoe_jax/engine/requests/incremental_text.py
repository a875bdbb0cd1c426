"""The text of a request while it grows: what of it can be shown already."""

from collections.abc import Sequence

from specmoe_jax.engine.requests.completion import TokenEvent
from specmoe_jax.engine.requests.finish import safe_length
from specmoe_jax.models.model import Model


class IncrementalText:
    """The text of one request so far, and how much of it has been shown."""

    def __init__(self, model: Model, stop: tuple[str, ...], prompt: str | Sequence[int] = ()):
        """prompt: what the text goes on from, where its decoding depends on that; nothing for an encoder-decoder."""
        decoded = () if model.config.encoder is not None else prompt
        ids = model.tokenizer.encode(decoded) if isinstance(decoded, str) else decoded
        self._decoder, self._stop, self._text, self._length = model.tokenizer.stream(ids), stop, "", 0

    def push(self, event: TokenEvent) -> str:
        """The text to show now; what may turn out to begin a stop string is held back."""
        self._text += "".join(self._decoder.push(token) for token in event.token_ids)
        done = event.completion
        text = self._text[: safe_length(self._text, self._stop)] if done is None else done.text
        piece, self._length = text[self._length :], max(self._length, len(text))
        return piece
