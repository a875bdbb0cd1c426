"""Experts on disk, a share of them cached in host memory: systems side by side in interleaved rounds; last line JSON.

Example:
    python scripts/convert_checkpoint.py --model=demo --output=demo_mapped --format=specmoe --dtype=float32
    python scripts/benchmark_disk.py --model=demo_mapped --share=0.333
Every read is one of the disk: the system's page cache is bypassed. Speed is relative to on_demand with the same policy.
"""

from _run import run

if __name__ == "__main__":
    run("benchmark_disk")
