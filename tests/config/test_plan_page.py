"""docs/plan.md is the table of a plan's fields as a page; write it anew with `python tests/config/test_plan_page.py`."""

import pathlib

from specmoe_jax.config.field_info import FieldSpec
from specmoe_jax.config.plan_fields import fields_of_a_plan

PAGE = pathlib.Path(__file__).parents[2] / "docs/plan.md"
HEAD = """# Fields of a plan

The fields of `specmoe_jax.Plan` and of a plan file, and the flags of `specmoe generate`, `plan` and `explain`, whose
names give their units. A field that has no effect given the others is an error. Generated from `specmoe_jax/config/plan_fields.py`.

| Field | Flag | Values | Default | |
|---|---|---|---|---|
"""


def row(spec: FieldSpec) -> str:
    default = "required" if spec.name == "preset" else spec.info.none or str(spec.default)
    unit = f", {spec.info.unit}" if spec.info.unit in ("bytes", "bytes/s", "tokens") else ""
    flag = "" if spec.flag is None else f"`--{spec.flag}`"
    return f"| `{spec.name}` | {flag} | {spec.expected}{unit} | {default} | {spec.info.help} |\n"


def page() -> str:
    return HEAD + "".join(map(row, fields_of_a_plan().values()))


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
