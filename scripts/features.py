"""Writes the hidden states of chosen layers for many texts: what the training of a draft head or a probe reads.

Example:
    python scripts/features.py --model=DIR --texts=texts.jsonl --layers=0,12,24 --output=FEATURES
"""

from _run import run

if __name__ == "__main__":
    run("features")
