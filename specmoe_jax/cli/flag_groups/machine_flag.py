"""--hardware: this machine, a known one or a file, with the memory that flags give it."""

import pathlib
from typing import NamedTuple

from specmoe_jax.autotune.probe import probe
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.machines import KNOWN, machine, read_machine
from specmoe_jax.support.errors import PlanError

THIS = "this"
HELP = f"this (measured; kept for a day), one of {', '.join(KNOWN)} (data sheets), or a JSON file of figures (docs/machines.md)."


class Named(NamedTuple):
    """said: what a file leaves out, for the assumptions of a prediction; None where nothing is."""

    hardware: Hardware
    said: str | None = None


def read_hardware(name: str, *, fresh: bool = False) -> Named:
    """This machine, a known one, or a JSON file. Raises PlanError."""
    if name == THIS:
        return Named(probe(fresh=fresh, progress=True) if fresh else probe(progress=True))
    if name in KNOWN or not pathlib.Path(name).suffix:
        return Named(machine(name))
    try:
        found = read_machine(pathlib.Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the hardware {name} ({e}); known are {', '.join(KNOWN)}") from e
    return Named(found.hardware, f"not in {name}, so as in {found.like}: {', '.join(found.taken)}" if found.taken else None)


def with_budgets(hardware: Hardware, budgets: dict) -> Hardware:
    """The machine with the memories that were given as budgets of the plan."""
    names = {"device_memory_bytes": "accelerator_memory_bytes", "host_memory_bytes": "host_memory_bytes"}
    return hardware.replace(**{names[name]: float(value) for name, value in budgets.items()})
