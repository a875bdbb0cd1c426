"""The flags that change single fields of a plan, the same in every command that takes a plan (adopt_module_key_flags).

They are made from the table of fields (config/plan_fields.py): a field with a flag has one here.
"""

from absl import flags

from specmoe_jax.cli.flag_groups.flag_names import scale_of, with_flags
from specmoe_jax.config.field_info import FieldSpec
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import fields_of_a_plan
from specmoe_jax.config.presets import preset
from specmoe_jax.config.registry import DRAFTS

FIELDS = {name: spec for name, spec in fields_of_a_plan().items() if spec.flag is not None}


def _help(spec: FieldSpec) -> str:
    """The field's help in the words of a command; without the flag the plan's own value holds."""
    names = {other.flag for other in FIELDS.values() if other.flag}
    return with_flags(spec.info.help + (f" Default: {spec.info.none}." if spec.info.none else ""), names)


def _can_be_a_flag(spec: FieldSpec, choice: str) -> bool:
    """A draft that is an object given to Engine cannot."""
    return spec.name != "draft" or DRAFTS.description(choice).given != "draft"


def _define(spec: FieldSpec) -> flags.FlagHolder:
    flag = spec.flag or spec.name
    if spec.choices is not None:
        return flags.DEFINE_enum(flag, None, [name for name in spec.choices if _can_be_a_flag(spec, name)], _help(spec))
    define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}[spec.type]
    return define(flag, None, _help(spec))


_FLAGS = {name: _define(spec) for name, spec in FIELDS.items()}


def value(name: str):
    """What a flag gives a field, in the field's unit; None where it is left out."""
    given, scale = _FLAGS[name].value, scale_of(FIELDS[name])
    return given if given is None or scale is None else given * scale


def given() -> dict:
    """The fields of the plan that are given as flags."""
    return {name: value(name) for name in FIELDS if value(name) is not None}


def budgets() -> dict:
    """Memory budgets, in bytes, those that are given."""
    return {name: found for name, found in given().items() if name in ("device_memory_bytes", "host_memory_bytes")}


def over(plan: Plan, **more) -> Plan:
    """The plan with the flags over it, and with `more` over both. Another draft takes the old one's settings along."""
    name = value("draft")
    draft = None if name is None else DRAFTS.description(name)
    if draft is not None and not draft.gated:
        plan = plan.replace(draft_experts=None, draft_set=None, substitution=None)
    if draft is not None and not draft.drafts:
        plan = plan.replace(draft_length=None)
    return plan.replace(**given() | more)


def as_flags(plan: Plan, config: ModelConfig) -> list[str]:
    """The flags that give a plan: its preset, what differs from it, and its dtype."""
    own, flags_ = preset(plan.preset, config), [f"--preset={plan.preset}", f"--dtype={plan.dtype}"]
    for name, spec in FIELDS.items():
        found = getattr(plan, name)
        if found == getattr(own, name) or name == "dtype":
            continue
        if isinstance(found, bool):
            flags_.append(f"--{'' if found else 'no'}{spec.flag}")
        else:
            scale = scale_of(spec)
            flags_.append(f"--{spec.flag}={found if scale is None else f'{found / scale:.4g}'}")
    return flags_
