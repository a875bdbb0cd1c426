"""Hardware: figures that are numbers, a JSON round trip, and known machines that say what they are."""

import json

import pytest

from specmoe_jax.planner.hardware import Efficiency, Hardware
from specmoe_jax.planner.machines import KNOWN, machine
from specmoe_jax.support.errors import PlanError

A30 = machine("a30")


@pytest.mark.parametrize("name", KNOWN)
def test_json_round_trip(name):
    assert Hardware.from_json(KNOWN[name].to_json()) == KNOWN[name]


def test_the_papers_machine_has_the_papers_figures():
    assert (A30.accelerator_flops("bfloat16"), A30.accelerator_bytes_per_s, A30.up_bytes_per_s) == (165e12, 933e9, 25e9)
    assert (A30.cpu_flops("float32"), A30.dram_bytes_per_s, A30.host_memory_bytes) == (2.43e12, 357e9, 250 << 30)
    assert not any(known.measured for known in KNOWN.values())


def test_figures_that_have_a_default_may_be_left_out():
    fields = json.loads(A30.to_json())
    for name in ("task_s", "efficiencies", "spreads", "accelerator_is_cpu"):
        del fields[name]
    read = Hardware.from_json(json.dumps(fields))
    assert read.task_s == 0 and read.efficiency("dense") == Efficiency() and read.spread("dense") == 0.2


@pytest.mark.parametrize(
    "change",
    [
        {"up_bytes_per_s": 0},
        {"up_bytes_per_s": float("nan")},
        {"dram_bytes_per_s": -1.0},
        {"disk_bytes_per_s": "3"},
        {"overlap": 1.5},
        {"efficiencies": (("dance", Efficiency()),)},
        {"efficiencies": (("dense", Efficiency(compute=0.0)),)},
        {"efficiencies": (("dense", Efficiency(overhead_s=-1.0)),)},
        {"spreads": (("link", 0.1),)},
    ],
)
def test_what_is_no_figure_is_refused(change):
    with pytest.raises(PlanError, match="hardware A30"):
        A30.replace(**change)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', A30.to_json().replace("task_s", "task")])
def test_what_is_no_hardware_is_refused(text):
    with pytest.raises(PlanError, match="hardware"):
        Hardware.from_json(text)


def test_efficiencies_that_are_no_objects_are_refused():
    with pytest.raises(PlanError, match="efficiencies or spreads"):
        Hardware.from_json(json.dumps(json.loads(A30.to_json()) | {"efficiencies": {"dense": 1.0}}))


def test_an_unknown_machine_is_refused_with_the_known_ones():
    with pytest.raises(PlanError, match="known are a30, 4090d"):
        machine("abacus")


def test_a_file_of_an_earlier_version_is_read():
    fields = json.loads(A30.replace(accelerator_is_cpu=True).to_json())
    fields["shared_cores"] = fields.pop("accelerator_is_cpu")
    assert Hardware.from_json(json.dumps(fields)) == A30.replace(accelerator_is_cpu=True)
