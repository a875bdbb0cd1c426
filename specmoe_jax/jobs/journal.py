"""Jobs that `kill -9` cannot lose: finished requests are appended to the output and survive whatever follows.

The output file itself says which requests are done; the journal beside it says which job it belongs to and carries
the lock. A line that was being written when the process died is cut off at the next start.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_whole

_LOG = logging.getLogger(__name__)
ANSWERS = ("text", "response", "answer")  # a line of a finished request or question has one of these


class Journal:
    """The output of a job, JSON lines in the order of completion, each `append` on disk (fsync) before the next begins.

    done: numbers (`index`) of the requests that are finished. requests: how many the job has; None where that is not known.
    Raises RequestError when the output belongs to another job (naming what changed), holds a line that the job did not write (with
    its number), is in use by another process, or cannot be written.
    """

    def __init__(self, output: str, fingerprint: dict, *, restart: bool = False, requests: int | None = None):
        self._requests = requests
        # A file that has a second name through a link has one lock.
        self._path = pathlib.Path(os.path.realpath(output) if os.path.islink(output) else output)
        self._journal_path = journal = self._path.with_name(self._path.name + ".journal")
        with _writing(journal):
            self._journal = open(journal, "ab+", buffering=0)  # what a buffer holds back would be written after a failure
        self._lock()
        if restart:
            with _writing(self._path):
                self._journal.truncate(0)
                self._path.unlink(missing_ok=True)
        with _writing(journal):
            self._claim(fingerprint)
        with _writing(self._path):
            self._file = open(self._path, "ab", buffering=0)
        self._end, self.done = self._read()
        _LOG.info("%s: %d requests were done before", self._path, len(self.done))
        self._file.truncate(self._end)

    def append(self, *records: dict) -> None:
        """Adds finished requests; when this returns, they survive. Raises RequestError if the disk does not take them."""
        self.check_present()
        line = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        try:
            _write_safely(self._file, line)
        except OSError as e:
            self._cut()
            raise RequestError(
                f"cannot write {self._path} ({e.strerror}); {len(self.done)} requests are safe in it, make room and run "
                "the same command again"
            ) from e
        self._end += len(line)
        self.done |= {record["index"] for record in records}

    def check_present(self) -> None:
        """Raises RequestError if the output or its journal has been removed, replaced or unmounted since the job began."""
        for file, path in ((self._file, self._path), (self._journal, self._journal_path)):
            try:
                there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except OSError:
                there = False
            if not there:
                raise RequestError(
                    f"{path} was removed, replaced or unmounted while the job ran; what was written since is not in it: run the "
                    "same command again"
                )

    def close(self) -> None:
        """Releases the job's lock on its output."""
        self._file.close()
        self._journal.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise RequestError(f"another process writes {self._path}; wait for it or choose another --output") from e

    def _claim(self, fingerprint: dict) -> None:
        """Writes the job's identity, or compares it with the file's. A torn first write counts as none."""
        self._journal.seek(0)
        try:
            written = json.loads(self._journal.read())
        except (ValueError, RecursionError):
            written = None
        if not isinstance(written, dict):
            if self._path.exists() and self._path.stat().st_size:
                raise RequestError(f"{self._path} exists and is no output of a job; move it, or overwrite it with --restart")
            self._journal.truncate(0)
            _write_safely(self._journal, json.dumps(fingerprint).encode())
            return
        changed = sorted(key for key in fingerprint.keys() | written.keys() if fingerprint.get(key) != written.get(key))
        if changed:
            raise RequestError(
                f"{self._path} was begun with other {', '.join(changed)}; run the first command to go on with it, or "
                "begin anew with --restart"
            )

    def _read(self) -> tuple[int, set[int]]:
        """The end of the last whole line, and the requests in the lines up to it."""
        end, done = 0, set()
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    done.add(self._index(line, done))
                except (ValueError, RecursionError) as e:
                    said = f"{self._path} holds a line that no job wrote, or another job: line {number} ({e})"
                    raise RequestError(f"{said}; move it, or begin anew with --restart") from e
                end += len(line)
        return end, done

    def _index(self, line: bytes, done: set[int]) -> int:
        """The number of the request that a line answers. Raises ValueError for a line that answers none."""
        record = json.loads(line)
        index: Any = record.get("index") if isinstance(record, dict) else None
        if not is_whole(index) or index < 0 or (self._requests is not None and index >= self._requests):
            raise ValueError(f"its index is {str(index)[:20]!r}")
        if not any(key in record for key in ANSWERS):
            raise ValueError("it holds no answer")
        if index in done:
            raise ValueError(f"index {index} is there twice")
        return index

    def _cut(self) -> None:
        """Removes a partially written line."""
        try:
            os.ftruncate(self._file.fileno(), self._end)
        except OSError:
            return  # the next start cuts it off


def read_identity(output: str) -> dict[str, Any] | None:
    """What the journal beside an output says of its job; None where there is none."""
    try:
        written = json.loads(pathlib.Path(f"{os.path.realpath(output)}.journal").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return written if isinstance(written, dict) else None


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """A system error before the job has begun, as one line."""
    try:
        yield
    except OSError as e:
        raise RequestError(f"cannot write {path} ({e.strerror}); choose another --output") from e


def _write_safely(file: io.FileIO, content: bytes) -> None:
    """Appends to an unbuffered file; all of it is on disk when this returns. Raises OSError, with a part of it written."""
    written = 0
    while written < len(content):
        written += file.write(content[written:])
    os.fsync(file.fileno())
