"""How much memory this process may take: what the machine has free, within the limits of its control groups.

Both versions of Linux's control groups are read, with the groups above this process's own; elsewhere nothing can be told.
"""

import contextlib
import ctypes
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

MEMINFO, GROUPS, ROOT = pathlib.Path("/proc/meminfo"), pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")
STATUS = pathlib.Path("/proc/self/status")


class Version(NamedTuple):
    """Where a version of control groups keeps its numbers. cache: of memory.stat, the file pages, which give way.

    Active ones too, as in MemAvailable: mapped experts are such pages once they have been read twice.
    """

    mounts: tuple[str, ...]
    limit: str
    usage: str
    cache: tuple[str, ...]


V1 = Version(("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = Version(("", "unified"), "memory.max", "memory.current", ("inactive_file", "active_file"))


def available_bytes() -> int | None:
    """Memory that is free or can be freed, within every limit; None where that cannot be told."""
    rooms = [room for folder, version in _groups() if (room := _room(folder, version)) is not None]
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        rooms.append(int(fields["MemAvailable"].split()[0]) * 1024)
    return min(rooms, default=None)


def anonymous_bytes() -> int | None:
    """Memory of this process that is no pages of files, which give way; None where that cannot be told."""
    with contextlib.suppress(OSError):
        if found := re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) << 10
    return None


def return_freed() -> None:
    """Gives memory that was freed back to the system, where the C library can: an allocator keeps what compilation took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _groups() -> Iterator[tuple[pathlib.Path, Version]]:
    """This process's memory groups, each with those above it.

    In a container the mounted root is its own group, whatever its path is called outside.
    """
    with contextlib.suppress(OSError):
        for line in GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inside = [part for part in path.split("/") if part not in ("", "..")]
            for version in (V2,) if not controllers else (V1,) if "memory" in controllers.split(",") else ():
                for mount, depth in itertools.product(version.mounts, range(len(inside), -1, -1)):
                    yield ROOT.joinpath(mount, *inside[:depth]), version


def _room(folder: pathlib.Path, version: Version) -> int | None:
    """What a group's limit leaves; None where there is none ("max")."""
    try:
        limit, used = (int((folder / file).read_text()) for file in (version.limit, version.usage))
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, KeyError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= sum(int(numbers[name]) for name in version.cache)
    return max(limit - used, 0)
