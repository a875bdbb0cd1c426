"""Two short runs on a machine with one GPU, unattended: correctness and the link (--run=1), then the systems (--run=2).

What they need and write, and how to read the rows: docs/accelerator_run.md.

Examples:
    python scripts/measure_gpu.py --run=1 --output=run1 --host_gib=128 --minutes=5.5
    python scripts/measure_gpu.py --output=results --parts=link,streaming --dry_run
"""

from _run import run

if __name__ == "__main__":
    run("measure_gpu")
