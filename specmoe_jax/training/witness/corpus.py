"""The corpus on disk: split by document, duplicates removed, tokenised.

data_dir/tokenizer.json         byte-level BPE trained on training documents
data_dir/train.npy              [tokens] uint16, documents in a seeded order, each followed by </s>
data_dir/held_out/CORPUS.npy    [tokens] uint16, the documents put aside, same layout
data_dir/held_out/CORPUS.txt    the same documents as text, separated by a form feed
data_dir/corpus.json            bytes, tokens and documents by corpus and split
"""

import hashlib
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from specmoe_jax.training.witness import pairs, sources

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SHINGLE = 13  # words; a training paragraph that shares so many in a row with held-out text is left out
LONG_ENOUGH = 60  # characters of a paragraph that counts as a duplicate when it comes again


class Split(NamedTuple):
    train: list[str]
    held_out: list[str]


def split(documents: list[str], every: int) -> Split:
    """Every `every`-th document is put aside, from the middle of each run."""
    held_out = [d for i, d in enumerate(documents) if i % every == every // 2]
    return Split(train=[d for i, d in enumerate(documents) if i % every != every // 2], held_out=held_out)


def shingles(text: str):
    """Hashes of every SHINGLE words in a row."""
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))


def held_out_shingles(splits: dict[str, Split]) -> frozenset[int]:
    return frozenset(h for part in splits.values() for document in part.held_out for h in shingles(document))


def cleaned(documents: list[str], forbidden: frozenset[int], seen: set[bytes]) -> list[str]:
    """Without paragraphs that were there before (`seen` grows) or that held-out text has too; what becomes empty is dropped."""
    out = []
    for document in documents:
        kept = []
        # A line is a verse, a gloss or a paragraph in most corpora; wrapped text has blank lines between paragraphs.
        separator = "\n\n" if "\n\n" in document else "\n"
        for paragraph in document.split(separator):
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
            if len(paragraph) >= LONG_ENOUGH:
                if key in seen or any(h in forbidden for h in shingles(paragraph)):
                    continue
                seen.add(key)
            kept.append(paragraph)
        text = separator.join(kept).strip("\n")
        if len(text) >= LONG_ENOUGH:
            out.append(text)
    return out


def train_tokenizer(documents, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[UNK, BOS, EOS], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents) -> np.ndarray:
    """Documents, each followed by </s> -> [tokens] uint16."""
    eos = tokenizer.token_to_id(EOS)
    rows = [[*e.ids, eos] for e in tokenizer.encode_batch(list(documents), add_special_tokens=False)]
    return np.concatenate([np.asarray(r, np.uint16) for r in rows])


def word_starts(tokenizer: pathlib.Path) -> np.ndarray:
    """Which entries do not go on with a word: those that begin with a space or with neither letter nor digit -> [V] bool."""
    coder = tokenizers.Tokenizer.from_file(str(tokenizer))
    texts = [coder.decode([index], skip_special_tokens=False) for index in range(coder.get_vocab_size())]
    return np.array([not text[:1].isalnum() for text in texts])


def stream(training: dict[str, list[str]], repeats: dict[str, int], seed: int) -> list[str]:
    """All training documents in a seeded order, those of a corpus `repeats` times."""
    documents = [d for name, found in training.items() for _ in range(repeats[name]) for d in found]
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def describe(tokenizer, splits: dict[str, Split], training: dict[str, list[str]], repeats: dict[str, int]) -> dict:
    def num_bytes(documents):
        return sum(len(d.encode()) for d in documents)

    return {
        name: {
            "package": sources.SOURCES[name].package if name in sources.SOURCES else "made from training documents",
            "licence": sources.SOURCES[name].licence if name in sources.SOURCES else "as their sources",
            "train_documents": len(training[name]),
            "train_bytes": num_bytes(training[name]),
            "removed_bytes": num_bytes(splits[name].train) - num_bytes(training[name]) if name in splits else 0,
            "repeats": repeats[name],
            "held_out_documents": len(splits[name].held_out) if name in splits else 0,
            "held_out_bytes": num_bytes(splits[name].held_out) if name in splits else 0,
        }
        for name in training
    }


def build(data_dir: pathlib.Path, *, vocab_size: int, held_out_every: int, seed: int) -> dict:
    """Writes every file but raw/, which must be there; returns corpus.json."""
    raw = data_dir / "raw"
    splits = {name: split(source.read(raw), held_out_every) for name, source in sources.SOURCES.items()}
    forbidden, seen = held_out_shingles(splits), set()
    training = {name: cleaned(part.train, forbidden, seen) for name, part in splits.items()}
    repeats = {name: source.repeats for name, source in sources.SOURCES.items()} | {"pairs": 1}
    # Pairs repeat what is trained on, so only held-out text is kept out of them.
    training["pairs"] = cleaned(pairs.make(training, seed), forbidden, set())
    tokenizer = train_tokenizer((d for found in training.values() for d in found[::2]), vocab_size)
    tokenizer.save(str(data_dir / "tokenizer.json"))
    tokens = encode(tokenizer, stream(training, repeats, seed))
    np.save(data_dir / "train.npy", tokens)
    (data_dir / "held_out").mkdir(exist_ok=True)
    for name, part in splits.items():
        np.save(data_dir / "held_out" / f"{name}.npy", encode(tokenizer, part.held_out))
        (data_dir / "held_out" / f"{name}.txt").write_text("\f".join(part.held_out))
    summary = {"train_tokens": len(tokens), "corpora": describe(tokenizer, splits, training, repeats)}
    (data_dir / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
