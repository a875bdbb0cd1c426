"""Experts in several processes: the tokens of one device, each link its own experts, each host its own part. See processes.py."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from engine_cases import plan, run
from processes import MTP, mtp_tokens

import specmoe_jax as sm
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY, tiny

FIRST = ("on_demand", "guard")
OTHERS = ("specmoe", "caching", "streaming", "eagle", "host", "ngram", "placed, on disk", "merged", *MTP)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@functools.cache
def outcomes(*names):
    """Of plans, in each of two processes with two devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    script, port = pathlib.Path(__file__).with_name("processes.py"), str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"XLA_FLAGS": flags}}
    both = [subprocess.Popen([sys.executable, script, port, str(number), *names], **pipes) for number in range(2)]
    try:
        said = [one.communicate(timeout=480) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], "\n".join(err[-3000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize("names", [FIRST, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["first", "others"])
def test_tokens_are_those_of_one_device_and_bytes_those_of_its_experts(names):
    """Ragged batches of eight rows, and of four that are refilled. Each process counts every link, and sends over its own."""
    expected, first, second = run(tiny(), plan("resident", batch_size=8))[0], *(told["plans"] for told in outcomes(*names))
    for name in names:
        tokens = mtp_tokens(name, 1, 1) if name in MTP else expected
        for found in (first[name], second[name]):
            length = len(found["tokens"][0])
            assert [tuple(row) for row in found["tokens"]] == [row[:length] for row in tokens], name
        if name in MTP:
            continue
        assert first[name]["sent"] == second[name]["sent"], name
        if first[name]["wanted"]:
            assert first[name]["sent"] == first[name]["wanted"][:2] + second[name]["wanted"][2:], name


def test_a_process_holds_the_experts_of_its_own_devices():
    first, second = outcomes(*FIRST)
    assert first["held"] == [[expert % 4 < 2 for expert in range(5)]] * 3
    assert second["held"] == [[expert % 4 >= 2 for expert in range(5)]] * 3


def test_what_processes_agree_on_is_the_first_ones():
    for told in outcomes(*FIRST):
        assert (told["agreed"], told["bytes"], told["differing"]) == (1.5, "0", ["own"])


def test_the_account_counts_the_experts_of_one_host():
    """Five experts of three layers on two devices: three of each layer are on the first."""
    one, two = (
        account(TINY, plan("on_demand", devices=2, num_processes=count), batch_rows=2, positions=64).host_experts
        for count in (1, 2)
    )
    assert (one, two) == (15, 9)


@pytest.mark.parametrize(
    ("a_plan", "said"),
    [
        (plan("on_demand", num_processes=2), "devices=1 of num_processes=2; give a multiple, as many to each"),
        (plan("on_demand", num_processes=2, devices=2), "num_processes=2 and jax.distributed has 1; start as many, or leave it 1"),
        (plan("on_demand", num_processes=0), "num_processes is 0; it must be a whole number of at least 1"),
        (
            plan("on_demand", num_processes=2, devices=2, expert_dtype="int8"),
            "expert_dtype=int8 packs all experts in each of num_processes=2; leave it out",
        ),
        (
            plan("specmoe", num_processes=2, devices=2, prefetch="draft", expert_tier="disk", host_memory_bytes=1e6),
            "prefetch=draft looks at what a disk has read by now, which num_processes=2 see differently",
        ),
    ],
)
def test_refused(a_plan, said):
    with pytest.raises(sm.PlanError) as e:
        sm.Engine(tiny(), a_plan)
    assert said in str(e.value) and "\n" not in str(e.value)
