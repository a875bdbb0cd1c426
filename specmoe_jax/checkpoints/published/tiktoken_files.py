"""Tokenizers of tiktoken's form: tokens as bytes with their ranks, and beside the file nothing but what the model's own code says.

Such a tokenizer merges the neighbours whose union has the lowest rank. Of `tokenizers`' BPE, which lists pairs, that is every way
to make a token of two others, in the order of ranks.
"""

import base64
import binascii
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from specmoe_jax.checkpoints.files import read_bytes, read_json
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.checkpoints.published.splitters import NORMALISED, SPLITTERS
from specmoe_jax.support.errors import CheckpointError

SETTINGS = "tokenizer_config.json"
KIMI_CLASS, KIMI_RESERVED = "TikTokenTokenizer", 256  # ids after the ranks, each a special token


class Form(NamedTuple):
    """splitter: a name of published/splitters.py. special: (directory, number of ranks) -> special tokens by id."""

    splitter: str
    special: Callable[[pathlib.Path, int], dict[int, str]]


def tiktoken_file(path: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer of a directory in this form; None where it has none."""
    return next((path / name for name in FORMS if (path / name).is_file()), None)


def read_tiktoken(file: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of such a file. Raises CheckpointError where it is broken, or something beside it is missing."""
    form = FORMS[file.name]
    special = form.special(file.parent, len(ranks := _ranks(file)))
    letters = _letters()
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    model = models.BPE(vocab=spelled, merges=_merges(spelled), ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC() if form.splitter in NORMALISED else None
    backend.pre_tokenizer, backend.decoder = SPLITTERS[form.splitter](), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for _, token in sorted(special.items())])
    if odd := [token for number, token in special.items() if backend.token_to_id(token) != number]:
        raise CheckpointError(
            f"{file.name}: special token {quote(odd[0])}: {SETTINGS} gives it an id that does not follow the ranks"
        )
    return backend


def _ranks(file: pathlib.Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank. Raises CheckpointError."""
    ranks = {}
    for number, line in enumerate(read_bytes(file).splitlines()):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise CheckpointError(f"{file.name}: line {number + 1}: expected a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{file.name}: expected a rank for each byte, and ranks from 0 on without a gap: is the download complete?"
        )
    return ranks


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it can be printed and is no space, else the next letter from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for token, rank in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((rank, cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _kimi_tokens(path: pathlib.Path, ranks: int) -> dict[int, str]:
    """The 256 ids after the ranks, under the names that tokenizer_config.json gives some of them."""
    if not (path / SETTINGS).is_file():
        raise CheckpointError(
            f"{path}: tiktoken.model holds ranks alone, and {SETTINGS} with the special tokens is missing: copy it from the "
            "model's repository, or tokenizer.json if it has one"
        )
    settings = read_json(path / SETTINGS)
    if settings.get("tokenizer_class", KIMI_CLASS) != KIMI_CLASS:
        raise CheckpointError(
            f"{path}: tiktoken.model of the class {quote(str(settings['tokenizer_class']))}; built is Kimi's {KIMI_CLASS}: make "
            "tokenizer.json with the model's own code"
        )
    named = settings.get("added_tokens_decoder") or {}
    tokens = {ranks + i: f"<|reserved_token_{ranks + i}|>" for i in range(KIMI_RESERVED)}
    try:
        tokens |= {int(number): str(token["content"] if isinstance(token, dict) else token) for number, token in named.items()}
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{SETTINGS}: added_tokens_decoder: expected an object of id to token") from None
    return tokens


def _qwen_tokens(path: pathlib.Path, ranks: int) -> dict[int, str]:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
    return {ranks + i: name for i, name in enumerate(names)}


FORMS = {"tiktoken.model": Form("kimi-k2", _kimi_tokens), "qwen.tiktoken": Form("qwen2", _qwen_tokens)}  # by the name of the file
