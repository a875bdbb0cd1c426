"""The plan: which parts of the engine are on, as one frozen configuration."""

import dataclasses
import json
from typing import Any

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan_checks import check_plan, check_values
from specmoe_jax.config.plan_fields import PlanFields, fields_of_a_plan
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.validation import is_whole, plain

VERSION = 1  # of the JSON form; files without one are of before there was a version, and read alike


@dataclasses.dataclass(frozen=True)
class Plan(PlanFields):
    """Which parts of the engine are on. Every system and baseline of both papers is a value of it.

    Its fields, with their types, defaults and help, are the table in plan_fields.py. A field that has no meaning under the
    other choices is left at its default; any other value is an error then, not ignored. Raises PlanError from `validate`.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    def replace(self, /, **changes) -> "Plan":
        """A copy with some fields changed. Unknown names raise PlanError."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise PlanError(f"a plan has no field {', '.join(unknown)}; its fields are {', '.join(field_names())}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """The JSON form, with its version."""
        return {"version": VERSION} | dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads what `to_json` wrote, now or before. Raises PlanError for anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"the plan is not JSON ({e}); write one with Plan.to_json or specmoe plan") from e
        if not isinstance(fields, dict) or not isinstance(fields.get("preset"), str):
            raise PlanError('the plan is not a JSON object with a "preset"; write one with Plan.to_json')
        _check_version(fields.pop("version", VERSION))
        table = fields_of_a_plan()
        per_layer = {name for name, value in fields.items() if isinstance(value, list) and name in table and table[name].per_layer}
        plan = Plan(preset=fields.pop("preset")).replace(**fields | {name: tuple(fields[name]) for name in per_layer})
        check_values(plan)
        return plan

    def resolved(self, *, accelerator_is_cpu: bool) -> "Plan":
        """With what it leaves to the machine."""
        return self.flow.resolved(self, accelerator_is_cpu=accelerator_is_cpu)

    def validate(self, config: ModelConfig) -> "Plan":
        """Returns itself, or raises PlanError naming the field, its value and what would work."""
        check_plan(self, config)
        return self


def _check_version(version: Any) -> None:
    if not is_whole(version) or not 1 <= version <= VERSION:
        raise PlanError(f"the plan has version {version!r}; this release reads versions up to {VERSION}: update specmoe_jax")


def field_names() -> list[str]:
    """Names of the fields of a plan, for messages."""
    return [f.name for f in dataclasses.fields(Plan)]
