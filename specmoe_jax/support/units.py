"""Units of memory, and sizes in them as texts."""

import math

GIB = 1 << 30


def size_text(num_bytes: float) -> str:
    """For people: the largest unit that leaves a digit before the point."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def ceil_gib(num_bytes: float) -> str:
    """Rounded up to six digits, so that the number given is one that works."""
    return f"{math.ceil(num_bytes * 10**6 / GIB) / 10**6:.6f}"
