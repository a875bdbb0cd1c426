"""What counts as a number where a user gives one."""


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """A finite number; JSON and flags also know nan and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
