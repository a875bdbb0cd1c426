"""Text to token ids and back: one face over tokenizers.Tokenizer."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import tokenizers
from tokenizers import processors

from specmoe_jax.checkpoints.files import read_bytes, read_json
from specmoe_jax.support.errors import CheckpointError

# The longest run of tokens that is held back because the text so far ends in half a character.
MAX_HELD_TOKENS = 32
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SETTINGS_FILE = "tokenizer_config.json"
CONTEXT_TOKENS = 8  # of a prompt, before what follows it is decoded
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"  # of gpt-oss


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """backend: the parsed tokenizer.json. eos_token_ids: every id that ends a text. bos_token_id: of tokenizer_config.json."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1; the model's vocabulary may be larger (padded)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; begins with BOS iff the tokenizer's own post-processor adds it, and add_special_tokens lets it."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """Text of ids. An id that the tokenizer lacks, as a padded vocabulary has, decodes to nothing.

        skip_special_tokens: None leaves them out, unless the text needs them (`shows_special`).
        """
        known = [int(i) for i in ids if 0 <= i < 1 << 32]
        skip_special_tokens = not self.shows_special if skip_special_tokens is None else skip_special_tokens
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder for one text that arrives token by token. prompt: the ids that it goes on from."""
        return StreamDecoder(self, prompt)

    def special_id(self, text: str) -> int | None:
        """The id of a special token with this spelling; None for any other text."""
        return next((id for id, token in self._special.items() if token == text), None)

    def special_in(self, text: str) -> str | None:
        """A special token that stands somewhere in a text, if there is one."""
        return next((token for token in self._special.values() if token in text), None)

    @property
    def _special(self) -> dict[int, str]:
        return {id: token.content for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def shows_special(self) -> bool:
        """Whether special tokens stay in texts: those of gpt-oss alone keep its channels apart."""
        return {CHANNEL, MESSAGE} <= set(self._special.values())


class StreamDecoder:
    """Decodes one growing text; never emits half a UTF-8 character.

    The pieces of `push` and the `finish` joined are `decode` of all ids, for every id sequence that is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Already emitted, or of the prompt; kept because decoders treat the first token of a text specially.
        self._context = list(context_of(tokenizer, prompt))
        self._held: list[int] = []  # tokens since the last point where the text ended in a whole character
        self._emitted = len(tokenizer.decode(self._context))  # characters of decode(context + held) that are not new

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


def context_of(tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The end of a prompt, cut where a character begins, with which what follows decodes as after all of the prompt."""
    for shift in range(4):  # a character may take four byte tokens
        context = prompt[-(CONTEXT_TOKENS + shift) :]
        if REPLACEMENT not in tokenizer.decode(context):
            return context
    return prompt


def text_after(tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What ids add to the text of a prompt: decoders of the sentencepiece kind drop the space before the first word of a text."""
    context = context_of(tokenizer, prompt)
    before, whole = tokenizer.decode(context), tokenizer.decode((*context, *ids))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


def load_tokenizer(path: pathlib.Path, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises CheckpointError when tokenizer.json is broken or empty.

    eos_token_ids: of the configs; the eos_token of tokenizer_config.json ends a text as well.
    """
    settings = read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}
    file = path / "tokenizer.json"
    backend = _parse(file, read_bytes(file))
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise CheckpointError(f"{file.name}: no token in it; expected a vocabulary")
    backend.no_truncation()  # some files carry the limits of their training run, which would cut prompts silently
    backend.no_padding()
    _add_ends(backend, settings)
    own = _token_id(backend, settings, "eos_token")
    ends = tuple(dict.fromkeys((*eos_token_ids, *(() if own is None else (own,)))))
    return Tokenizer(backend=backend, eos_token_ids=ends, bos_token_id=_token_id(backend, settings, "bos_token"))


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


def _token_id(backend: tokenizers.Tokenizer, settings: dict, key: str) -> int | None:
    """The id of a token that tokenizer_config.json names, as a text or as an AddedToken."""
    token = settings.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(token) if isinstance(token, str) else None


def _add_ends(backend: tokenizers.Tokenizer, settings: dict) -> None:
    """BOS and EOS around a text as add_bos_token and add_eos_token say, which come before what tokenizer.json does."""
    if not isinstance(settings.get("add_bos_token"), bool) and not isinstance(settings.get("add_eos_token"), bool):
        return
    ids = {key: _token_id(backend, settings, key) for key in ("bos_token", "eos_token")}
    wanted = {key: settings.get(f"add_{key}") is True and ids[key] is not None for key in ids}
    if "add_bos_token" not in settings:  # then what tokenizer.json does stays
        wanted["bos_token"] = _begins_with(backend, ids["bos_token"])
    template = f"{'bos_token:0 ' * wanted['bos_token']}$A:0{' eos_token:0' * wanted['eos_token']}"
    named = [(key, ids[key]) for key in ids if wanted[key]]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)


def _begins_with(backend: tokenizers.Tokenizer, token_id: int | None) -> bool:
    return token_id is not None and backend.encode("").ids[:1] == [token_id]
