"""Whose rows of a batch are whose, of several devices. Pure."""

from typing import TypeVar

Rows = TypeVar("Rows", int, float)


def rows_of_device(rows: Rows, devices: int) -> Rows:
    """Rows that each device has: its share where there are as many of each, else all of them."""
    return rows if rows % devices else rows // devices
