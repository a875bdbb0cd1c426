"""What commands print for people fits a terminal of 80 columns, and loses nothing by it."""

import json
import pathlib

import pytest

from specmoe_jax.cli.shown.benchmark_table import as_text, folded
from specmoe_jax.cli.shown.machine_text import machine_text
from specmoe_jax.planner.machines import KNOWN, machine

FILES = sorted((pathlib.Path(__file__).parents[2] / "docs/benchmarks").rglob("*.json"))


def test_columns_go_on_below():
    lines = folded(["", "row"], [["first", "1"], ["second", "2"], ["third", "3"]], most=18)
    assert lines == ["     first  second", "row      1       2", "", "     third", "row      3"]


def test_a_column_that_is_too_wide_is_shown_nevertheless():
    assert folded(["", "row"], [["a long title", "1"]], most=10) == ["     a long title", "row             1"]


def test_recorded_tables_fit_and_show_every_row_and_ratio():
    documents = [json.loads(path.read_text()) for path in FILES]
    tables = [rows for document in documents if "tables" in document for rows in document["tables"].values()]
    assert len(tables) > 20
    for rows in tables:
        text = as_text(rows)
        assert max(map(len, text.splitlines())) <= 80
        assert all(name in text for name in rows)
        for row in rows.values():
            if row["ratios"]:
                assert f"{row['ratios']['decode_tokens_per_s'][0]:.2f} (" in text
        assert "SYNTHETIC: " in text


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.every_case
def test_a_machine_fits(name):
    text = machine_text(machine(name))
    assert max(map(len, text.splitlines())) <= 80 and machine(name).name in text
