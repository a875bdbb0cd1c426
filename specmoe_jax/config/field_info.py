"""The metadata of a plan's fields, from which their checks, flags, --help and JSON reading derive."""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from specmoe_jax.support.validation import is_number, is_whole

PROBABILITY = "probability"  # the unit of a number from 0 to 1


class Needs(NamedTuple):
    """The choice under which a field has an effect. without: where it has none, for messages; {plan.x} is the field x."""

    condition: Callable[[Any], bool]
    without: str


class FieldInfo(NamedTuple):
    """Metadata of a field of a plan, beside its type and default.

    help: one line. none: what None stands for. choices: names, for a choice whose names are not written as a Literal.
    unit: of a number. lower: the smallest whole number. needs: choices that it has no effect without. by_draft: some drafts
    use it and others do not, as their descriptions say. flag: its name in scripts, "" for the field's own, None for none.
    """

    help: str
    none: str = ""
    choices: Iterable[str] | None = None
    unit: str = ""
    lower: int = 1
    needs: tuple[Needs, ...] = ()
    by_draft: bool = False
    flag: str | None = ""


class FieldSpec(NamedTuple):
    """A row of the table. type: of one value, str, bool, int or float. per_layer: so is a tuple of one for each layer."""

    name: str
    type: type
    default: Any
    optional: bool
    per_layer: bool
    choices: Iterable[str] | None
    info: FieldInfo

    @property
    def flag(self) -> str | None:
        """The name of its flag, None where it has none."""
        return self.name if self.info.flag == "" else self.info.flag

    @property
    def expected(self) -> str:
        """The expected value, for messages."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.type is bool:
            return "true or false"
        if self.type is str:
            return "a text"
        if self.type is float:
            return "a probability" if self.info.unit == PROBABILITY else "a finite number above 0"
        whole = "a whole number, 0 or more" if self.info.lower == 0 else f"a whole number of at least {self.info.lower}"
        return whole + (", or a tuple of one for each layer" if self.per_layer else "")

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the field's type and in its range."""
        if value is None:
            return self.optional
        if self.per_layer and isinstance(value, tuple):
            return bool(value) and all(map(self._accepts_one, value))
        return self._accepts_one(value)

    def _accepts_one(self, value: Any) -> bool:
        if self.choices is not None:
            return isinstance(value, str) and value in tuple(self.choices)
        if self.type is int:
            return is_whole(value) and value >= self.info.lower
        if self.type is float:
            return is_number(value) and (0 <= value <= 1 if self.info.unit == PROBABILITY else value > 0)
        return isinstance(value, self.type)


def field(default: Any, help: str, **info: Any) -> Any:
    """A field of a plan with its metadata; the arguments are those of FieldInfo."""
    return dataclasses.field(default=default, metadata={"info": FieldInfo(help, **info)})


@functools.cache
def table_of(cls: type) -> dict[str, FieldSpec]:
    """The fields of a dataclass, by name and in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: _spec(field, hints[field.name]) for field in dataclasses.fields(cls)}


def _spec(field: dataclasses.Field, hint: Any) -> FieldSpec:
    info: FieldInfo = field.metadata["info"]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = list(typing.get_args(hint)) if union else [hint]
    literal = next((part for part in parts if typing.get_origin(part) is typing.Literal), None)
    default = None if field.default is dataclasses.MISSING else field.default
    return FieldSpec(
        name=field.name,
        type=str if literal else parts[0],
        default=default,
        optional=type(None) in parts,
        per_layer=any(typing.get_origin(part) is tuple for part in parts),
        choices=typing.get_args(literal) if literal else info.choices,
        info=info,
    )
