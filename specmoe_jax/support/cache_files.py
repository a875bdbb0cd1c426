"""Where this package keeps what it can compute again, and JSON files there that may be missing, damaged or unwritable."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform


def cache_folder() -> pathlib.Path:
    """$XDG_CACHE_HOME or ~/.cache, specmoe_jax in it."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specmoe_jax"


def machine_key(*parts: object) -> str:
    """A file name for what was measured here: host, processor, its cores, and whatever else it depends on."""
    processor = _processor()
    facts = (platform.node(), platform.machine(), processor, os.cpu_count(), *parts)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    """Its name where the system tells; a container may move to another machine and keep its own name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def read_cached(folder: str, key: str) -> dict | None:
    """What an earlier run left; None where there is nothing that can be read."""
    try:
        found = json.loads((cache_folder() / folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_cached(folder: str, key: str, content: dict) -> None:
    """Done without where the cache cannot be written (read-only home, full disk): the next run measures again."""
    path = cache_folder() / folder / f"{key}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(path)
