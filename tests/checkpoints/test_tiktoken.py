"""Tokenizers in tiktoken's form (Kimi-K2, Qwen) give the ids that tiktoken's own algorithm gives."""

import base64
import itertools
import json
import re

import pytest
from small_checkpoint_files import write_checkpoint
from tokenizers import pre_tokenizers

from specmoe_jax.checkpoints.loader import load_config
from specmoe_jax.checkpoints.model_tokenizer import load_model_tokenizer
from specmoe_jax.jobs.job import read_head
from specmoe_jax.support.errors import CheckpointError

MERGED = (
    b" t",
    b"he",
    b" the",
    b"es",
    b"est",
    b"ti",
    b"im",
    b"time",
    b" time",
    b"es s",
    b"\xe6\x97\xa5",
    b" \xc3",
    b"\xc3\xa9",
    b"aa",
    b"aaa",
)
RANKS = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(MERGED)}
TEXTS = ["the best times, the times", "  naïve été\n\n  日本 aaaaaaa", "times s 1234", "hE's <|im_end|> x", "", " "]


def write_ranks(file, ranks=RANKS):
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def by_ranks(piece: bytes) -> list[int]:
    """tiktoken's algorithm: as it stands if that is a token, else merge the pair of the lowest rank, the leftmost first."""
    if piece in RANKS:
        return [RANKS[piece]]
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        rank, i = min((RANKS.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [RANKS[part] for part in parts]


@pytest.fixture
def path(tmp_path):
    path = write_checkpoint(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"vocab_size": 600}))
    return path


def read(path):
    return load_model_tokenizer(path, load_config(path))


def pieces(tokenizer, text: str) -> list[str]:
    """What the splitter makes of a text without special tokens, as letters for bytes."""
    return [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken"])
def test_ids_are_those_of_the_ranks(name, path):
    write_ranks(path / name)
    end = 256 + len(MERGED) + (1 if name == "tiktoken.model" else 2)
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": {str(end): {"content": "<|im_end|>"}}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read(path)
    assert end in tokenizer.eos_token_ids
    for text in TEXTS:
        want = []
        for part in re.split(r"(<\|im_end\|>)", text):
            if part == "<|im_end|>":
                want.append(end)
                continue
            for piece in pieces(tokenizer, part):
                want += by_ranks(bytes_of(piece))
        assert tokenizer.encode(text) == want, text
        assert tokenizer.decode(want, skip_special_tokens=False) == text
    assert read_head(path).tokenizer.encode("the") == tokenizer.encode("the")


def bytes_of(piece: str) -> bytes:
    """Of GPT-2's letters for bytes: the printable ones for themselves, then the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    assert set(piece) <= set(pre_tokenizers.ByteLevel.alphabet())
    return bytes(ord(letter) if ord(letter) < 0x100 else others[ord(letter) - 0x100] for letter in piece)


def test_reserved_tokens_have_names(path):
    write_ranks(path / "tiktoken.model")
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"280": {"content": "[BOS]"}}}))
    tokenizer = read(path)
    assert tokenizer.vocab_size == len(RANKS) + 256
    assert tokenizer.encode("[BOS]<|reserved_token_281|>") == [280, 281]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "tokenizer_config.json").unlink(), "tokenizer_config.json with the special tokens is missing: copy it"),
        (lambda p: (p / "tiktoken.model").write_bytes(b"{}"), "line 1: expected a token in base64 and its rank"),
        (lambda p: (p / "tiktoken.model").write_bytes(b"IQ== 0\n"), "expected a rank for each byte"),
        (lambda p: (p / "tokenizer_config.json").write_text('{"tokenizer_class": "HYTokenizer"}'), "of the class HYTokenizer"),
        (
            lambda p: (p / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3000": {"content": "x"}}}'),
            "does not follow the ranks",
        ),
    ],
)
def test_what_is_missing_or_broken_is_said(damage, words, path):
    write_ranks(path / "tiktoken.model")
    (path / "tokenizer_config.json").write_text("{}")
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
