"""What a part measured and what it is doing: rows go to one file as they are measured, and what fails becomes a row too."""

import json
import logging
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator

ROWS, LOG = "rows.jsonl", "log.txt"
_LOG = logging.getLogger(__name__)
SHOWN = 160  # characters of a row or a message that are printed


def append(folder: pathlib.Path, row: dict) -> None:
    """One line of OUTPUT/rows.jsonl, on the disk when this returns."""
    with open(folder / ROWS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: pathlib.Path) -> list[dict]:
    """The rows of a folder so far; a line that a killed part left unfinished is none."""
    path, rows = folder / ROWS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def say(what: str) -> None:
    """What is under way, for whoever listens (the command prints it)."""
    _LOG.info("%s", what)


def asked(question: str, rows: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The rows of one question. What it raises is a row with the traceback, and the next question can be asked."""
    say(question)
    start_s = time.perf_counter()
    try:
        yield from rows()
    except Exception as e:
        say(f"{question}: failed, {type(e).__name__}: {str(e)[:SHOWN]}")
        failed = {"asked": question, "failed": traceback.format_exc()[-3000:]}
        yield {"question": "failure", **failed, "seconds": time.perf_counter() - start_s}


def line(row: dict) -> str:
    """The start of a row for a screen: the figures that tell most first."""
    first = ("question", "preset", "batch", "form", "failed", "refused", "decode_tokens_per_s", "fraction_of_floor")
    ordered = {key: row[key] for key in first if row.get(key) is not None} | row
    shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in ordered.items()}
    return json.dumps(shown)[:SHOWN]
