"""Predicts a checkpoint on a machine: memory, batch, speed, bottleneck. Reads config.json and headers, never a weight.

Examples:
    python scripts/explain.py --model=DIR --hardware=a30 --preset=specmoeoff --batch_size=64
    python scripts/explain.py --model=DIR --hardware=h100 --simulate      (every preset beside each other, and cache policies)
"""

from _run import run

if __name__ == "__main__":
    run("explain")
