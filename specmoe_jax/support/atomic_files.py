"""Files that are there in full or not at all."""

import contextlib
import errno
import os
import pathlib

from specmoe_jax.support.errors import RequestError


def check_writable(path: str) -> None:
    """Refuses a path that could not be written to, before anything is computed. Raises RequestError."""
    with _writing_to(path):
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        with open(f"{path}.partial", "w"):
            pass


def write_atomically(path: str, text: str) -> None:
    """Writes beside the file and renames, so that nothing half-written is left. Raises RequestError."""
    with _writing_to(path):
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.partial", path)


@contextlib.contextmanager
def _writing_to(path: str):
    """Says in one line why a file cannot be written, and leaves no part of it behind."""
    try:
        yield
    except OSError as e:
        raise RequestError(f"cannot write {path} ({e.strerror}); give a file in a folder that exists and is writable") from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.partial")
