"""Text to token ids and back: one face over tokenizers.Tokenizer."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import tokenizers

from specmoe_jax.checkpoints.files import read_bytes, read_json
from specmoe_jax.support.errors import CheckpointError

# The longest run of tokens that is held back because the text so far ends in half a character.
MAX_HELD_TOKENS = 32
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """backend: the parsed tokenizer.json. eos_token_ids: every id that ends a text."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1; the model's vocabulary may be larger (padded)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text; begins with BOS iff the tokenizer's own post-processor adds it."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. An id that the tokenizer lacks, as a padded vocabulary has, decodes to nothing."""
        known = [int(i) for i in ids if 0 <= i < 1 << 32]
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def stream(self) -> "StreamDecoder":
        """A decoder for one text that arrives token by token."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes one growing text; never emits half a UTF-8 character.

    The pieces of `push` and the `finish` joined are `decode` of all ids, for every id sequence that is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # already emitted; kept because decoders treat the first token of a text specially
        self._held: list[int] = []  # tokens since the last point where the text ended in a whole character
        self._emitted = 0  # characters of decode(context + held) that have been emitted

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._held.append(int(token_id))
        text = self._tokenizer.decode(self._context + self._held)
        whole = text if len(self._held) > MAX_HELD_TOKENS else text.rstrip(REPLACEMENT)
        piece = whole[self._emitted :]
        self._emitted = max(self._emitted, len(whole))
        if len(whole) == len(text):
            self._shift()
        return piece

    def finish(self) -> str:
        """What is still held back, an unfinished character as U+FFFD."""
        text = self._tokenizer.decode(self._context + self._held)
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def _shift(self) -> None:
        """Makes the held tokens the context of what follows, once they carry text of their own."""
        if not self._tokenizer.decode(self._held):
            return
        self._context, self._held = self._held, []
        self._emitted = len(self._tokenizer.decode(self._context))


def load_tokenizer(path: pathlib.Path, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises CheckpointError when tokenizer.json is broken or empty.

    eos_token_ids: of the configs; when they name none, "eos_token" of tokenizer_config.json is taken.
    """
    file = path / "tokenizer.json"
    backend = _parse(file, read_bytes(file))
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise CheckpointError(f"{file.name}: no token in it; expected a vocabulary")
    backend.no_truncation()  # some files carry the limits of their training run, which would cut prompts silently
    backend.no_padding()
    return Tokenizer(backend=backend, eos_token_ids=eos_token_ids or _eos_of_tokenizer_config(path, backend))


def _parse(file: pathlib.Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        text = content.decode("utf-8")
        if not isinstance(json.loads(text).get("model"), dict):
            raise ValueError("it has no model")
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as e:  # the parser raises Exception, and a panic of it is no Exception at all
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(e).replace("\n", " ")[:120]
        raise CheckpointError(f"{file.name}: not a tokenizer of the tokenizers library ({reason})") from None


def _eos_of_tokenizer_config(path: pathlib.Path, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    file = path / "tokenizer_config.json"
    if not file.exists():
        return ()
    token = read_json(file).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(token) if isinstance(token, str) else None
    return () if token_id is None else (token_id,)
