"""The benchmark of the disk tier runs, checks its tokens and ends with one JSON document."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "benchmark_disk.py"


@pytest.mark.slow
def test_one_short_round():
    flags = ["--rounds=1", "--tokens=2", "--batches=1", "--policies=frequency"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=True)
    table = json.loads(done.stdout.splitlines()[-1])["tables"]["1"]
    assert len(table) == 4
    for name, row in table.items():
        assert row["disk_bytes"] > 0, name
        assert (row["ratios"] is None) == name.startswith("on_demand")
