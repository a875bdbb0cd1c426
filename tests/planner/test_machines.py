"""Machines by name and from files; docs/machines.md is their table, written anew with `python -m tests.planner.test_machines`."""

import dataclasses
import json
import pathlib

import pytest

import specmoe_jax as sm
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.machines import DEFAULT, FIGURES, KNOWN, machine, read_machine
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.units import GIB
from specmoe_jax.support.validation import is_number

PAGE = pathlib.Path(__file__).parents[2] / "docs/machines.md"
HEAD = """# Machines

`--hardware=NAME` of `specmoe explain` and `specmoe plan`. Data sheets, none of it measured by this project; the hosts
are assumed, so give your own memory with `--host_memory_gib`. Generated from `specmoe_jax/planner/machines.py`.

| name | machine | link GB/s | TFLOP/s bfloat16 | memory GB/s | memory GiB | host GiB | DRAM GB/s |
|---|---|---|---|---|---|---|---|
"""
FILE = """
## A machine file

`--hardware=mine.json`: a JSON object with any of these figures. `"like"` names the known machine that gives those that are
left out (without it `{default}`, the column on the right); `specmoe explain` then says which ones those were. In Python:
`specmoe_jax.Hardware`, whose `to_json` writes such a file.

```json
{{"name": "my desktop", "like": "4090", "host_memory_bytes": 137438953472, "dram_bytes_per_s": 80e9}}
```

| figure | unit | | if left out |
|---|---|---|---|
"""


def page() -> str:
    rows = "".join(map(row, KNOWN.items()))
    return HEAD + rows + FILE.format(default=DEFAULT) + "".join(map(figure, FIGURES))


def row(entry: tuple[str, Hardware]) -> str:
    name, m = entry
    rates = (m.up_bytes_per_s / 1e9, m.accelerator_flops_bfloat16 / 1e12, m.accelerator_bytes_per_s / 1e9)
    memories = (m.accelerator_memory_bytes / GIB, m.host_memory_bytes / GIB, m.dram_bytes_per_s / 1e9)
    numbers = " | ".join(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in (*rates, *memories))
    return f"| `{name}` | {m.name}{', no accelerator' if m.accelerator_is_cpu else ''} | {numbers} |\n"


def figure(name: str) -> str:
    unit, words = FIGURES[name]
    value = getattr(machine(DEFAULT), name)
    default = {"name": f"a machine like {DEFAULT}", "efficiencies": "those of known machines", "spreads": "0.2 of each"}.get(name)
    shown = default or (f"{value:.4g}" if is_number(value) else str(value).lower())
    return f"| `{name}` | {unit} | {words} | {shown} |\n"


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_figure_has_a_unit_and_words():
    assert list(FIGURES) == [field.name for field in dataclasses.fields(Hardware)]


def test_the_names_that_people_ask_for():
    asked = "3090 4090 5090 a100 a6000 l40s b200 gh200 h100 h200 tpu_v5e tpu_v6e tpu_v7x m4_max".split()
    assert set(asked) <= set(KNOWN) and sm.Hardware is Hardware
    for name, found in KNOWN.items():  # a link is slower than the memory behind it, and that than the accelerator's
        assert found.up_bytes_per_s <= found.dram_bytes_per_s <= found.accelerator_bytes_per_s, name
        assert found.accelerator_flops_float32 <= found.accelerator_flops_bfloat16


@pytest.mark.parametrize(("typed", "meant"), [("h10", "h100"), ("tpu-v5e", "tpu_v5e"), ("RTX4090", "4090"), ("A100", "a100")])
def test_the_nearest_name_is_suggested(typed, meant):
    with pytest.raises(PlanError, match=f"did you mean {meant}"):
        machine(typed)


def test_a_file_may_be_partial():
    found = read_machine('{"name": "mine", "like": "l4", "host_memory_bytes": 2e11, "disk_bytes_per_s": 7e9}')
    assert found.hardware == machine("l4").replace(name="mine", host_memory_bytes=2e11, disk_bytes_per_s=7e9)
    assert found.like == "l4" and "up_bytes_per_s" in found.taken and "host_memory_bytes" not in found.taken
    nothing = read_machine("{}")
    assert nothing.hardware == machine(DEFAULT).replace(name=f"a machine like {DEFAULT}") and nothing.like == DEFAULT


def test_a_whole_file_takes_nothing_from_anywhere():
    mine = machine("t4").replace(name="mine", efficiencies=())
    assert read_machine(mine.to_json()) == (mine, "", ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no JSON object"),
        ("{", "not JSON"),
        ('{"like": "l5"}', "did you mean l4"),
        ('{"like": "l4", "speed": 3}', "unknown or missing speed"),
        ('{"like": "l4", "disk_bytes_per_s": 0}', "disk_bytes_per_s is 0"),
        (json.dumps({"like": 4090, "name": 3}), 'no.*"name"'),
    ],
)
def test_a_file_that_cannot_be_is_one_line(text, said):
    with pytest.raises(PlanError, match=said) as refused:
        read_machine(text)
    assert "\n" not in str(refused.value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
