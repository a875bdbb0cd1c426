"""What counts as a number or a text where a user gives one."""

from typing import Any

import numpy as np


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number; JSON and flags also know nan and infinity, and whole numbers beyond any float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) < float("inf")
    except OverflowError:
        return False


def is_text(value: str) -> bool:
    """Whether a str can be written as UTF-8: single surrogates come out of JSON escapes and of arguments that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any) -> Any:
    """A scalar of NumPy as Python's own, which JSON and checks of types know, also in a tuple; anything else as it is."""
    if isinstance(value, tuple) and any(isinstance(entry, np.generic) for entry in value):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
