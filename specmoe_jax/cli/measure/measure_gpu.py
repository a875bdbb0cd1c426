"""Everything that a machine with one GPU is asked, unattended: every part a process of its own, ended after --part_minutes.

A part's rows go to OUTPUT/PART.json as they are measured, so a killed part keeps its rows. Parts that have their file are done
again only with --again. --dry_run runs the same code on sizes for a CPU, whose figures mean nothing.

Examples:
    specmoe measure_gpu --output=results
    specmoe measure_gpu --output=results --minutes=25 --part_minutes=4 --parts=settle,mixtral_streaming,ffn
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags

from specmoe_jax.benchmarks.gpu import parts
from specmoe_jax.cli import common

_PARTS = flags.DEFINE_list("parts", list(parts.PARTS), f"Some of {', '.join(parts.PARTS)}.")
_OUTPUT = flags.DEFINE_string("output", None, "A folder for the JSON documents.", required=True)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Small sizes, to see that it runs; the figures mean nothing.")
_AGAIN = flags.DEFINE_boolean("again", False, "Also parts whose file is there already.")
_MINUTES = flags.DEFINE_float("part_minutes", 10, "After so many minutes a part is ended; it decodes for half of them.")
_ALL_MINUTES = flags.DEFINE_float(
    "minutes", None, "For all parts together: after so many the one under way is ended, and no other starts."
)
_HERE = flags.DEFINE_string("here", None, "Run this part in this process (used by the script itself).")


def main() -> None:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _HERE.value:
        keep_rows(_HERE.value, folder)
        return
    if unknown := sorted(set(_PARTS.value) - set(parts.PARTS)):
        common.usage_error(f"no part {', '.join(unknown)}; the parts are {', '.join(parts.PARTS)}")
    end_s = float("inf") if _ALL_MINUTES.value is None else time.monotonic() + 60 * _ALL_MINUTES.value
    for part in _PARTS.value:
        minutes = min(_MINUTES.value, (end_s - time.monotonic()) / 60)
        if minutes <= 0:
            print(f"{part}: not started, --minutes={_ALL_MINUTES.value:g} are over", flush=True)
        elif _AGAIN.value or not (folder / f"{part}.json").exists():
            print(f"{part}: {run_part(part, folder, minutes)}", flush=True)
        else:
            print(f"{part}: has its file; --again measures it again", flush=True)


def run_part(part: str, folder: pathlib.Path, minutes: float) -> str:
    """In a process of its own, whose messages go to OUTPUT/PART.log. -> how it ended."""
    command = [*parts.COMMAND, f"--here={part}", f"--output={folder}", f"--dry_run={_DRY_RUN.value}"]
    command.append(f"--part_minutes={minutes}")
    with open(folder / f"{part}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            return f"ended after {minutes:.3g} minutes; what it had is kept"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that the part started
            process.wait()
    return "done" if code == 0 else f"failed (exit {code}), see {folder / part}.log; what it had is kept"


def keep_rows(part: str, folder: pathlib.Path) -> None:
    """Runs a part here; its document is written again after every row."""
    document = {"part": part, "dry_run": _DRY_RUN.value, "command": " ".join(["specmoe", "measure_gpu", *sys.argv[1:]]), "rows": []}
    for row in (parts.PARTS | parts.INNER)[part](folder, parts.Effort(_DRY_RUN.value, _MINUTES.value)):
        document["rows"].append(row)
        partial = folder / f".{part}.json.partial"
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / f"{part}.json")
        print(json.dumps(row), flush=True)
