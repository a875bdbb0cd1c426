"""The files of a run: each can be written, and none would overwrite another."""

import os
import pathlib
import stat

from specmoe_jax.support.atomic_files import check_writable, descriptor_of
from specmoe_jax.support.errors import RequestError


def check_files(
    *, read: dict[str, str | None], written: dict[str, str | None], output: str | None = None, trace: str | None = None
) -> None:
    """read, written: flags with their files, None where they are not given. output: of a job, which has a journal beside it.

    Raises RequestError.
    """
    names = {os.path.realpath(path): flag for flag, path in read.items() if path is not None} | _streams()
    if output is not None:
        if descriptor_of(output) is not None:
            raise RequestError(f"--output is {output}; a job needs a file of its own: leave --output out for the texts on stdout")
        names[os.path.realpath(f"{output}.journal")] = "the journal of --output"
    for flag, path in ({"--output": output} | written).items():
        if path is None:
            continue
        check_writable(path)
        if descriptor_of(path) is not None:  # written through, beside what else goes there
            continue
        if (file := os.path.realpath(path)) in names:
            raise RequestError(f"{names[file]} and {flag} are both {path}; give two files")
        names[file] = flag
    if trace and pathlib.Path(trace).exists() and not pathlib.Path(trace).is_dir():
        raise RequestError(f"cannot write {trace} (it is no folder); --trace takes a new folder or one that exists")
    if trace and (inside := [flag for file, flag in names.items() if os.path.realpath(trace) == file]):
        raise RequestError(f"{inside[0]} and --trace are both {trace}; give --trace a folder of its own")


def _streams() -> dict[str, str]:
    """The files that standard output and error were redirected into."""
    found = {}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                found[os.path.realpath(f"/proc/self/fd/{descriptor}")] = name
        except OSError:  # it is closed
            continue
    return found
