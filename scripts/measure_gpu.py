"""Everything that a machine with one GPU is asked, unattended: every part a process of its own, ended after --part_minutes.

A part's rows go to OUTPUT/PART.json as they are measured, so what is killed keeps what it had. Parts that have their file are done
again only with --again. --dry_run runs the same code on sizes for a CPU, whose figures mean nothing.

Example:
    python scripts/measure_gpu.py --output=results
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import _common
from absl import flags

from specmoe_jax.benchmarks.gpu import parts

_PARTS = flags.DEFINE_list("parts", list(parts.PARTS), f"Some of {', '.join(parts.PARTS)}.")
_OUTPUT = flags.DEFINE_string("output", None, "A folder for the JSON documents.", required=True)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Small sizes, to see that it runs; the figures mean nothing.")
_AGAIN = flags.DEFINE_boolean("again", False, "Also parts whose file is there already.")
_MINUTES = flags.DEFINE_float("part_minutes", 10, "After so many minutes a part is ended.")
_HERE = flags.DEFINE_string("here", None, "Run this part in this process (used by the script itself).")


def main() -> None:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _HERE.value:
        keep_rows(_HERE.value, folder)
        return
    if unknown := sorted(set(_PARTS.value) - set(parts.PARTS)):
        _common.usage_error(f"no part {', '.join(unknown)}; the parts are {', '.join(parts.PARTS)}")
    for part in _PARTS.value:
        if _AGAIN.value or not (folder / f"{part}.json").exists():
            print(f"{part}: {run_part(part, folder)}", flush=True)
        else:
            print(f"{part}: has its file; --again measures it again", flush=True)


def run_part(part: str, folder: pathlib.Path) -> str:
    """In a process of its own, whose messages go to OUTPUT/PART.log. -> how it ended."""
    command = [sys.executable, __file__, f"--here={part}", f"--output={folder}", f"--dry_run={_DRY_RUN.value}"]
    with open(folder / f"{part}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | parts.environment(), start_new_session=True)
        try:
            code = process.wait(60 * _MINUTES.value)
        except subprocess.TimeoutExpired:
            return f"ended after {_MINUTES.value:g} minutes; what it had is kept"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what the part itself has started
            process.wait()
    return "done" if code == 0 else f"failed (exit {code}), see {folder / part}.log; what it had is kept"


def keep_rows(part: str, folder: pathlib.Path) -> None:
    """Runs a part here; its document is written again after every row."""
    document = {"part": part, "dry_run": _DRY_RUN.value, "command": " ".join(["python", *sys.argv]), "rows": []}
    for row in (parts.PARTS | parts.INNER)[part](folder, _DRY_RUN.value):
        document["rows"].append(row)
        partial = folder / f".{part}.json.partial"
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / f"{part}.json")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _common.run(main)
