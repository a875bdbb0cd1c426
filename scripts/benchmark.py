"""Presets side by side in one process on one model, in interleaved rounds; the last line is one JSON document.

Example:
    python scripts/benchmark.py --suite=specmoe --model=nllb_shaped --tables=batches --link_gbps=0.02
Columns: tok/s of the decoding, job tok/s of whole jobs; kB/tok: expert bytes over the link per token; floor: share of the floor
(floor s) that was reached; wasted: of the prefetched bytes; growth: bytes for one token of every row, over the smallest batch's;
x caching: speed over that preset's; link s, compute s: of a step alone, x floor and x sum: a step over their maximum and their sum;
CPU rows, moves: of a split draft cache; MiB acc.: peak of the accelerator. Speed and bytes are ratios to the named base: median
(least-most) of the rounds. Columns that hold nothing are left out.
"""

from _run import run

if __name__ == "__main__":
    run("benchmark")
