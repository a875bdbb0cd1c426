"""Every preset with every draft gives one device's tokens on two and on four. See devices_of_presets.py."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from devices_of_presets import DRAFTED, PRESETS, cases, plan_of, refusal

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS


def test_every_name_is_there():
    assert set(PRESETS) == set(sm.PRESETS) and {draft.split()[0] for draft in DRAFTED} == set(DRAFTS)
    assert {name.split(", ")[0] for name in cases()} == set(DRAFTED)


def test_several_devices_take_what_one_takes():
    for preset, draft in itertools.product(PRESETS, DRAFTED):
        one, two, four = (refusal(plan_of(preset, draft, devices)) for devices in (1, 2, 4))
        assert one == two == four, (preset, draft)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_tokens_are_those_of_one_device(devices):
    """Greedy and sampled rows; of a batch that is refilled, and of one after the other."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, pathlib.Path(__file__).with_name("devices_of_presets.py"), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["found"]) == set(cases())
    assert [name for name, tokens in told["found"].items() if tokens != told["expected"]] == []
