"""Figures of a checkpoint that specmoe train_witness exported: bits per byte, routing, repetition.

    python scripts/evaluate_witness.py --model=DIR --output=report.json

Bits per byte are of the exported weights in float32, in windows without overlap, so every window starts without context.
"""

from _run import run

if __name__ == "__main__":
    run("evaluate_witness")
