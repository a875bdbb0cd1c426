"""Everything that a machine with one GPU is asked, unattended: every part a process of its own, ended after --part_minutes.

A part's rows go to OUTPUT/PART.json as they are measured, so what is killed keeps what it had. Parts that have their file are done
again only with --again. --dry_run runs the same code on sizes for a CPU, whose figures mean nothing.

Examples:
    python scripts/measure_gpu.py --output=results
    python scripts/measure_gpu.py --output=results --minutes=25 --part_minutes=4 --parts=settle,mixtral_streaming,ffn
"""

from _run import run

if __name__ == "__main__":
    run("measure_gpu")
