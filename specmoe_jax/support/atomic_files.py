"""Files that are there in full or not at all; what leads to an open file of this process (/dev/stdout) is written through."""

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator

from specmoe_jax.support.errors import RequestError

DESCRIPTORS = "/proc/self/fd"
MOST_LINKS = 40  # as many as Linux follows


def check_writable(path: str) -> None:
    """Refuses a path that could not be written to, before anything is computed. Raises RequestError."""
    with _writing_to(path):
        if descriptor_of(path) is not None:
            return
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        _new_file_beside(_target(path)).unlink()


def write_atomically(path: str, text: str) -> None:
    """Writes beside the file and renames, so that nothing half-written is left. Raises RequestError.

    A link stays one: its target is replaced.
    """
    with _writing_to(path):
        if (descriptor := descriptor_of(path)) is not None:
            _write_all(descriptor, text.encode())
            return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[pathlib.Path]:
    """A file beside the one of this path, whose place it takes at the end; it is gone after an error. Raises RequestError."""
    with _writing_to(path):
        temporary = _new_file_beside(_target(path))
        try:
            yield temporary
            os.replace(temporary, _target(path))
        finally:
            temporary.unlink(missing_ok=True)


def descriptor_of(path: str) -> int | None:
    """The open file of this process that a path leads to, as /dev/stdout and /dev/fd/3 do; None of any other. Raises OSError."""
    descriptors = os.path.realpath(DESCRIPTORS)
    for _ in range(MOST_LINKS):
        folder, name = os.path.split(path)
        if os.path.realpath(folder or ".") == descriptors and name.isdigit():
            return int(name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _target(path: str) -> str:
    return os.path.realpath(path) if os.path.islink(path) else path


def _new_file_beside(path: str) -> pathlib.Path:
    """An empty file of a name that nobody has, in the same folder."""
    file = pathlib.Path(path)
    temporary = file.with_name(f".{file.name[:100]}.{secrets.token_hex(6)}.partial")
    temporary.touch(exist_ok=False)
    return temporary


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


@contextlib.contextmanager
def _writing_to(path: str):
    """Says in one line why a file cannot be written."""
    try:
        yield
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        reason = e.strerror if isinstance(e, OSError) else e
        raise RequestError(f"cannot write {path} ({reason}); give a file in a folder that exists and is writable") from e
