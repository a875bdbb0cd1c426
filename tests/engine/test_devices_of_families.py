"""Families, drafts, services and scores give one device's answers on several. See devices_of_families.py."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from devices_of_families import FEATURES, PAIRS

QUICK = ("recurrent layers", "a service")


def outcomes(devices: int, *names: str) -> dict:
    """Of names, in a process with four devices: the answers on one and on several."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, pathlib.Path(__file__).with_name("devices_of_families.py"), str(devices), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict) -> None:
    assert all(one for one, _ in found.values())
    if "scores" in found:
        one, several = found.pop("scores")
        assert several == pytest.approx(one, abs=1e-4)
    assert [name for name, (one, several) in found.items() if one != several] == []


@pytest.mark.parametrize("names", [QUICK, tuple(name for name in FEATURES if name not in QUICK)], ids=["first", "others"])
def test_features_on_two_devices(names):
    check(outcomes(2, *names))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({family for family, _ in PAIRS}))
def test_every_draft_of_every_kind_of_family_on_four_devices(family):
    check(outcomes(4, *(f"{name}, {draft}" for name, draft in PAIRS if name == family)))
