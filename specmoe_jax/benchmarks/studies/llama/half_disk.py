"""Steps of a model of which a control group lets half stay in memory, beside llama.cpp's mapped file; run by hand:

    python -m specmoe_jax.benchmarks.studies.llama.half_disk --folder=DIR --cgroup=GROUP [--llama_python=PYTHON]

DIR: as of compare.py, which makes the files. GROUP: a folder of a memory control group (version 1 or 2) that this user may write
to. Tokens are sampled at a high temperature: greedy text of random weights repeats itself, with the same few experts.

Every engine is a process in a group of its own below it, limited to `--share` of the checkpoint's bytes, and runs alone; pages of
the files are dropped before, so that what is cached is cached within the limit. Rounds alternate between the engines; figures are
medians over all steps of all rounds after the first --settle seconds of each. The system's readahead decides much: it is told. A
process that the system kills is told as such.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

from specmoe_jax.benchmarks.studies.llama.compare import Worker, llama_python
from specmoe_jax.benchmarks.studies.measure_promises import limited

OURS = ("host_compute", "on_demand", "caching", "specmoe", "streaming", "host_compute lossless", "on_demand lossless")
THEIRS = "llama.cpp bf16"
TEMPERATURE = 100.0
MOST_STEPS = 200  # of either part: a row has no room for more
AT_A_TIME = 2  # steps between two looks at the clock


def started(engine: str, folder: pathlib.Path, options: argparse.Namespace, group: pathlib.Path, limit: int) -> Worker:
    """The process of an engine, with its model loaded."""
    if engine == THEIRS:
        given = {"model": str(folder / f"{options.shape}-bf16.gguf"), "threads": os.cpu_count(), "temperature": TEMPERATURE}
        return Worker(engine, options.llama_python, "llama", given, group)
    preset, form = [*engine.split(), "bfloat16"][:2]
    given = {"model": str(folder / f"{options.shape}-{form}"), "dtype": "bfloat16", "temperature": TEMPERATURE}
    mapped = {"flow": preset} if preset == "host_compute" else {"preset": preset, "memory_bytes": int(limit * options.promised)}
    return Worker(engine, sys.executable, "own", given | mapped, group)


def drop_pages(folder: pathlib.Path) -> None:
    """Of every file of the models, which would else be read at no cost to a group."""
    os.sync()
    for file in folder.rglob("*"):
        if file.suffix in (".safetensors", ".gguf"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(engine: str, folder: pathlib.Path, options: argparse.Namespace, limit: int, rows: int) -> dict:
    """Seconds of its steps and its first tokens; or how it ended."""
    drop_pages(folder)
    group = limited(pathlib.Path(options.cgroup), limit)
    try:
        worker = started(engine, folder, options, group, limit)
        worker.ask(do="start", rows=rows)
        found: dict[str, list[float]] = {"settle": [], "seconds": []}
        for name, seconds in (("settle", options.settle), ("seconds", options.seconds)):
            until = time.perf_counter() + seconds
            while time.perf_counter() < until and len(found[name]) < MOST_STEPS:
                found[name] += worker.ask(do="steps", count=AT_A_TIME)
        row = {"seconds": found["seconds"], "tokens": worker.tokens, "peak_gb": worker.peak_bytes / 1e9}
        worker.close()
        return row
    except SystemExit as e:
        return {"ended": str(e)}
    finally:
        time.sleep(0.5)  # a group that a process has just left is not empty yet
        group.rmdir()


def main() -> None:
    from specmoe_jax.benchmarks.studies.llama import files
    from specmoe_jax.checkpoints.conversion.convert import convert

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--cgroup", required=True)
    parser.add_argument("--shape", default="varied")
    parser.add_argument("--share", type=float, default=0.5, help="of the checkpoint, that a process may hold")
    parser.add_argument("--promised", type=float, default=0.95, help="of the limit, that our plans are made for")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--engines", default=",".join((*OURS, THEIRS)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--llama_python", help="a Python that has llama-cpp-python")
    options = parser.parse_args()
    folder = pathlib.Path(options.folder)
    plain, lossless = files.mapped(folder, options.shape, "bfloat16"), folder / f"{options.shape}-lossless"
    if not lossless.exists():
        convert(str(plain), lossless, to="specmoe", packing="lossless")
    files.gguf_file(folder, options.shape, "bf16")
    options.llama_python = options.llama_python or llama_python(folder)
    limit = int(options.share * sum(file.stat().st_size for file in (folder / f"{options.shape}-bfloat16").glob("*.safetensors")))
    device = os.stat(folder).st_dev
    readahead = pathlib.Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb").read_text().strip()
    print(f"a limit of {limit / 1e9:.2f} GB, readahead of {readahead} kB", flush=True)
    for rows in map(int, options.batches.split(",")):
        steps: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for engine in options.engines.split(","):
                row = measured(engine, folder, options, limit, rows)
                steps.setdefault(engine, []).extend(row.pop("seconds", []))
                print(json.dumps({"engine": engine, "batch": rows, "steps": len(steps[engine])} | row), flush=True)
        for engine, seconds in steps.items():
            rate = rows / statistics.median(seconds) if seconds else None
            print(json.dumps({"engine": engine, "batch": rows, "tokens_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
