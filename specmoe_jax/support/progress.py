"""Bars with rate and time left: on a terminal, as a log line each 10 seconds, or none."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import tqdm

PROGRESS = ("auto", "log", "none")
LOG_EVERY_S = 10.0
SHOWN_AFTER_S = 0.5  # shorter work shows no bar
TICK_S = 0.5


class _WholeLines:
    """Standard error without the line ends and returns that tqdm writes between its bars."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _LogLines(tqdm.tqdm):
    """Whole lines instead of one that is redrawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg != "":  # what tqdm clears a bar with
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True


def note(text: str, *, mode: str | bool) -> None:
    """A line on standard error where a bar of this mode would be seen."""
    if mode == "log" or (mode in ("auto", True) and sys.stderr.isatty()):
        tqdm.tqdm.write(text, file=sys.stderr)


def beside_bars() -> contextlib.AbstractContextManager:
    """In it whole lines are printed to standard output: bars that are shown on the same terminal make room for them."""
    return tqdm.tqdm.external_write_mode()


def bar(
    name: str, total: int | None, unit: str, *, mode: str | bool, leave: bool = True, scale: bool = False, initial: int = 0
) -> tqdm.tqdm:
    """A bar on standard error; `.update(n)` moves it. It is a context manager.

    mode: "auto" (silent where standard error is no terminal), "log" (a line each 10 s, none for shorter work), "none".
    True and False stand for "auto" and "none". leave: keep it when it is done. scale: 1.2M instead of 1200000.
    initial: what was done before, for work that goes on.
    """
    mode = {True: "auto", False: "none"}[mode] if isinstance(mode, bool) else mode
    if mode not in PROGRESS:
        raise ValueError(f"progress is {mode!r}; it must be one of {', '.join(PROGRESS)}")
    common: dict[str, Any] = dict(desc=name, total=total, unit=unit, unit_scale=scale, initial=initial)
    if total is None:  # nothing to count: how long it has taken, not "0step [00:10, ?step/s]"
        common["bar_format"] = "{desc}: {elapsed}"
    if mode == "log":
        rhythm: dict[str, Any] = dict(mininterval=LOG_EVERY_S, maxinterval=LOG_EVERY_S, miniters=1, delay=LOG_EVERY_S)
        return _LogLines(**common, **rhythm, file=_WholeLines(), ncols=100)
    return tqdm.tqdm(**common, disable=None if mode == "auto" else True, leave=leave, delay=0.0 if leave else SHOWN_AFTER_S)


@contextlib.contextmanager
def ticking(shown: tqdm.tqdm) -> Iterator[tqdm.tqdm]:
    """A bar whose time goes on while nothing calls `update`, as during a compilation."""
    if shown.disable:
        yield shown
        return
    done, rhythm_s = threading.Event(), LOG_EVERY_S if isinstance(shown, _LogLines) else TICK_S

    def tick() -> None:
        while not done.wait(rhythm_s):
            shown.refresh()

    thread = threading.Thread(target=tick, name="specmoe-progress", daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        done.set()
        thread.join()
