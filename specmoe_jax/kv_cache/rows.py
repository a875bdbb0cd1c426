"""Whose rows of a batch are whose, of several devices. Pure."""


def rows_of_device(rows: int, devices: int) -> int:
    """Rows that each device has: its share where there are as many of each, else all of them."""
    return rows if rows % devices else rows // devices
