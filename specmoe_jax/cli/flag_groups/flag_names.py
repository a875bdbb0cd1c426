"""Translates messages: the library names the fields of a plan, a command names its flags."""

import re
from collections.abc import Container

from specmoe_jax.config.field_info import FieldSpec
from specmoe_jax.config.plan_fields import fields_of_a_plan
from specmoe_jax.support.units import GIB, ceil_gib

# Flags in other units than their fields, by how they end: what one of the flag is in the field's unit.
SCALES = {"_gib": GIB, "_gbps": 1e9}
ENGINE_ARGUMENTS = ("draft_model", "draft_head")  # arguments of Engine that are flags of the same name and take a directory
_VALUE = r"\([^)]*\)|[\w.+-]*\w"


def scale_of(spec: FieldSpec) -> float | None:
    """What one of the flag's unit is in the field's; None where they are the same."""
    return next((scale for end, scale in SCALES.items() if (spec.flag or "").endswith(end)), None)


def with_flags(text: str, defined: Container[str]) -> str:
    """A message with the flags of a command in the place of the fields that it has flags for. defined: names of its flags.

    `field=value` becomes `--flag=value` in the flag's unit, a switch `--flag`. Of names that stand alone those become flags
    that are no words of English, which have an underscore.
    """
    known = {name: spec.flag or name for name, spec in fields_of_a_plan().items()} | {name: name for name in ENGINE_ARGUMENTS}
    known = {name: flag for name, flag in known.items() if flag in defined}
    if not known:
        return text
    names = "|".join(sorted(known, key=len, reverse=True))
    pattern = rf"(?<![\w/.'\"-])({names})(?:=({_VALUE})|(?![\w/.=]))"
    return re.sub(pattern, lambda match: _as_flag(match[1], match[2], known), text)


def _as_flag(name: str, value: str | None, known: dict[str, str]) -> str:
    if value is None:
        place = "=DIR" if name in ENGINE_ARGUMENTS else ""
        return f"--{known[name]}{place}" if "_" in name else name
    if value in ("True", "False"):
        return f"--{'' if value == 'True' else 'no'}{known[name]}"
    spec = fields_of_a_plan().get(name)
    scale = scale_of(spec) if spec is not None else None
    return f"--{known[name]}={value if scale is None else _scaled(float(value), scale)}"


def _scaled(value: float, scale: float) -> str:
    """Memory is rounded up, so that the number given is one that works."""
    return ceil_gib(value) if scale == GIB else f"{value / scale:g}"
