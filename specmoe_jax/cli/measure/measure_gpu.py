"""Two short runs on a machine with one GPU, unattended: correctness and the link (--run=1), then the systems (--run=2).

Each row is a line of OUTPUT/rows.jsonl as soon as it is measured; OUTPUT/log.txt has what was printed. Every part is a process of
its own with a time limit; what fails in it becomes a row, and the next part starts. Parts that ended well are done again only with
--again. --dry_run runs the same code on sizes for a CPU, whose figures mean nothing. How to read the rows: docs/accelerator_run.md.

Examples:
    specmoe measure_gpu --run=1 --output=run1 --host_gib=128 --minutes=5.5
    specmoe measure_gpu --output=results --parts=link,streaming --dry_run
"""

import logging
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

from absl import flags

from specmoe_jax.benchmarks.gpu import parts, record
from specmoe_jax.cli import common
from specmoe_jax.models.model import PINNED_LIMIT
from specmoe_jax.support.units import GIB

SILENCE_S = 5  # after which a line says what is under way
FIRST_RUN = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""Compiles fast: cuBLAS by its own choice of kernels, none tried out. A user's XLA_FLAGS stay, and these come before them."""
DRY_RUN = f"{FIRST_RUN} --xla_backend_optimization_level=0"

_RUN = flags.DEFINE_integer("run", None, f"Parts of this run: {'; '.join(f'{n}: ' + ', '.join(p) for n, p in parts.RUNS.items())}.")
_PARTS = flags.DEFINE_list("parts", None, f"Some of {', '.join(parts.PARTS)} (default: those of --run, or of both runs).")
_OUTPUT = flags.DEFINE_string("output", None, "A folder for the rows.", required=True)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Small sizes, to see that it runs; the figures mean nothing.")
_AGAIN = flags.DEFINE_boolean("again", False, "Also parts that ended well in this folder already.")
_PART_MINUTES = flags.DEFINE_float("part_minutes", None, "After so many minutes a part is ended (default: each part's own limit).")
_MINUTES = flags.DEFINE_float(
    "minutes", None, "For all parts together: after so many the one under way is ended, and no other starts."
)
_HOST_GIB = flags.DEFINE_float(
    "host_gib", None, "Host memory that the machine is said to have; a virtual machine may show less until it is used."
)
_HERE = flags.DEFINE_string("here", None, "Run this part in this process (used by the command itself).")


def main() -> None:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _HERE.value:
        keep_rows(_HERE.value, folder)
        return
    chosen = _chosen()
    end_s = float("inf") if _MINUTES.value is None else time.monotonic() + 60 * _MINUTES.value
    done = {row.get("part") for row in record.read(folder) if row.get("ended") == "done"}
    for name in chosen:
        limit_s = parts.PARTS[name].seconds if _PART_MINUTES.value is None else 60 * _PART_MINUTES.value
        limit_s = min(limit_s, end_s - time.monotonic())
        if name in done and not _AGAIN.value:
            print(f"{name}: ended well in {folder} already; --again measures it again", flush=True)
        elif limit_s <= 0:
            print(f"{name}: not started, --minutes={_MINUTES.value:g} are over", flush=True)
            record.append(folder, {"part": name, "question": "part", "ended": "not started"})
        else:
            print(f"{name}: {run_part(name, folder, limit_s)}", flush=True)


def _chosen() -> list[str]:
    if _RUN.value is not None and _RUN.value not in parts.RUNS:
        common.usage_error(f"--run={_RUN.value}; the runs are {', '.join(map(str, parts.RUNS))}")
    if _RUN.value is not None and _PARTS.value is not None:
        common.usage_error("--run and --parts both say what to measure; give one of them")
    if unknown := sorted(set(_PARTS.value or ()) - set(parts.PARTS)):
        common.usage_error(f"no part {', '.join(unknown)}; the parts are {', '.join(parts.PARTS)}")
    return _PARTS.value or list(parts.RUNS[_RUN.value] if _RUN.value else parts.PARTS)


def run_part(name: str, folder: pathlib.Path, limit_s: float) -> str:
    """In a process of its own, whose lines are printed and kept. -> how it ended, of which a row is kept too."""
    command = [*parts.COMMAND, f"--here={name}", f"--output={folder}", f"--dry_run={_DRY_RUN.value}"]
    command += [] if _HOST_GIB.value is None else [f"--host_gib={_HOST_GIB.value}"]
    start_s = time.monotonic()
    with open(folder / record.LOG, "ab") as log:
        process = subprocess.Popen(
            command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = "time is over" if _watched(name, process, log, start_s + limit_s) is None else None
        finally:
            _end(process)
    seconds = time.monotonic() - start_s
    ended = ended or ("done" if process.returncode == 0 else f"failed (exit {process.returncode})")
    record.append(folder, {"part": name, "question": "part", "ended": ended, "seconds": seconds, "limit_s": limit_s})
    return f"{ended} after {seconds:.0f} s" + ("" if ended == "done" else "; what it had is kept")


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Of a part: fast compilation on a GPU, room for pinned memory by what the machine is said to have, and no grouped products
    where an earlier part found them wrong."""
    env = dict(os.environ)
    env["XLA_FLAGS"] = f"{DRY_RUN if _DRY_RUN.value else FIRST_RUN} {env.get('XLA_FLAGS', '')}".strip()
    if _HOST_GIB.value is not None:
        env.setdefault(PINNED_LIMIT, str(int(_HOST_GIB.value * 3 / 4)))
    if parts.grouped_failed(record.read(folder)):
        env.setdefault("SPECMOE_GROUPED", "none")
    return env


def _watched(name: str, process: subprocess.Popen[bytes], log: BinaryIO, end_s: float) -> int | None:
    """Prints what the process says, and that it is under way where it says nothing. -> its exit code; None: the time is over."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    start_s, last = time.monotonic(), "starts"
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(SILENCE_S, left_s))
        except queue.Empty:
            if time.monotonic() < end_s:
                print(f"[{name} {time.monotonic() - start_s:.0f} s] still: {last}", flush=True)
            continue
        if line is None:
            return process.wait()
        log.write(line)
        log.flush()
        text = line.decode(errors="replace").rstrip()[: record.SHOWN]
        last = last if text.startswith("{") else text  # a row is what is done
        print(f"[{name} {time.monotonic() - start_s:.0f} s] {text}", flush=True)
    return None


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and those that it started, which may outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def keep_rows(name: str, folder: pathlib.Path) -> None:
    """Runs a part here."""
    common.use_compile_cache()
    _print_what_is_said()
    host_bytes = None if _HOST_GIB.value is None else int(_HOST_GIB.value * GIB)
    effort = parts.Effort(folder, _DRY_RUN.value, host_bytes)
    failed = False
    for row in record.asked(name, lambda: parts.PARTS[name].rows(effort)):
        record.append(folder, {"part": name, "dry_run": _DRY_RUN.value} | row)
        record.say(record.line(row))
        failed |= row["question"] == "failure"
    sys.exit(1 if failed else 0)


def _print_what_is_said() -> None:
    said, printed = logging.getLogger(record.__name__), logging.StreamHandler(sys.stdout)
    printed.setFormatter(logging.Formatter("%(message)s"))
    said.addHandler(printed)
    said.setLevel(logging.INFO)
    said.propagate = False
