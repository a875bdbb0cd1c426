"""Experts on several devices: the tokens of one, and over each link the bytes of its own experts. See several_devices.py."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from engine_cases import SAMPLED, plan, run
from several_devices import PLANS

import specmoe_jax as sm
from specmoe_jax.engine.validation import check_popularity
from specmoe_jax.models.model import to_host
from specmoe_jax.offload.sharded_store import ShardedStore
from specmoe_jax.offload.store import Link
from specmoe_jax.offload.tiers import HostTier
from specmoe_jax.testing import tiny

FIRST = ("on_demand", "specmoe")
OTHERS = tuple(name for name in PLANS if name not in FIRST)


@functools.cache
def outcomes(*names):
    """Of plans, in a process with four devices."""
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, pathlib.Path(__file__).with_name("several_devices.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": devices}, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    """Tokens of one device, greedy and sampled."""
    sampled = plan("resident", batch_size=8, deterministic_sampling=True)
    return run(tiny(), plan("resident", batch_size=8))[0], run(tiny(), sampled, params=SAMPLED)[0]


@pytest.mark.parametrize("names", [FIRST, OTHERS], ids=["first", "others"])
def test_tokens_are_those_of_one_device_and_bytes_those_of_its_experts(names, expected):
    """Ragged batches of eight rows, of four that are refilled, and of one; five experts on two and on four devices."""
    for name, found in outcomes(*names)["plans"].items():
        tokens = expected[name == "sampled"]
        for devices, several in found.items():
            length = len(several["tokens"][0])
            assert [tuple(row) for row in several["tokens"]] == [row[:length] for row in tokens], (name, devices)
            assert several["sent"] == (several["wanted"] or several["sent"]), (name, devices)
            assert len(several["decoding"]) == int(devices) and sum(several["decoding"]) == several["link_bytes"]
            if several["link_bytes"]:
                assert several["balance"] == pytest.approx(max(several["decoding"]) / np.mean(several["decoding"]))
        if name == "on_demand":  # nothing but what a pass needs
            assert len({several["link_bytes"] for several in found.values()}) == 1


@pytest.mark.parametrize("names", [FIRST, OTHERS], ids=["first", "others"])
def test_each_device_has_the_cache_of_its_rows(names):
    """All of it where the rows are no multiple of the devices; in host memory it is once."""
    for name, found in outcomes(*names)["plans"].items():
        a_plan = PLANS[name][0]
        for devices, several in ((int(count), several) for count, several in found.items()):
            if several["cache"] is None:
                assert a_plan.flow.streams_layers
                continue
            held, held_bytes = several["cache"]
            if a_plan.kv_tier == "host":
                assert held == [8] and several["accounted"] == 0 and several["said"] == []
                continue
            rows = a_plan.batch_size
            said = f"all {rows}, no multiple of {devices} devices" if rows % devices else f"{rows // devices} of {rows}"
            assert several["said"] == ([said] if devices > 1 else []), (name, devices)
            assert held == [rows if rows % devices else rows // devices] * devices, (name, devices)
            assert held_bytes == [several["accounted"]] * devices, (name, devices)


def test_programs_over_cache_rows_are_those_of_one_device():
    found = outcomes(*FIRST)["caches"]
    assert len(found) == 3 * 4 + 2 and all(map(all, found))


def test_popularity_is_counts_of_the_models_experts():
    placed = plan("on_demand", devices=2, placement="popularity")
    for a_plan, counts, said in (
        (placed, None, "placement=popularity needs to know how often experts are chosen; give popularity"),
        (plan("on_demand"), np.ones((3, 5)), "popularity has no effect with placement=modulo; leave it out"),
        (placed, np.ones((2, 5)), "popularity is float64 [2, 5]; give counts of 0 or more, [3, 5]"),
        (placed, np.full((3, 5), np.nan), "give counts of 0 or more"),
    ):
        with pytest.raises(sm.PlanError, match=re.escape(said)):
            check_popularity(tiny().config, a_plan, counts)


def test_links_work_at_the_same_time():
    assert all(2 < busy <= 3 for busy in outcomes(*FIRST)["lanes"])


@pytest.mark.parametrize("room", [0, 3])
def test_the_store_of_one_device_is_a_case_of_several(room):
    """Shards, slots and copies of a mesh of one, on an accelerator of its own too."""
    tier = HostTier((tuple(to_host(np.full((3, 2, 4), 1 + expert, np.float32)) for expert in range(6)),), jax.local_devices()[:1])
    store = ShardedStore(tier, [Link()], jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("devices",)), room=room)
    pool, arriving = store.fetch(store.new_pool(4), [(0, 4, 2), (0, 1, 0)])
    assert len(arriving) == (2 if room else 0)
    pool, arriving = store.finish_copies(pool, arriving, np.array([-1, 0]))
    assert arriving == () and np.asarray(pool.blocks)[:, 0, 0, 0].tolist() == [2, 0, 5, 0]
    pool, arriving = store.fetch(pool, [(0, 5, 3)], arriving)
    jax.block_until_ready([one.block for one in arriving])
    pool, arriving = store.finish_arrived(pool, arriving)
    assert arriving == () and np.asarray(pool.blocks)[:, 0, 0, 0].tolist() == [2, 0, 5, 6]
    assert np.asarray(store.stream(store.new_buffer(), store.send_for(0)).blocks)[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert store.links[0].sent_bytes == (1 + 3 + 6) * 96 and store.copies_within(1.0) == ((3,) if room else (6,))


@pytest.mark.parametrize(
    ("a_plan", "said"),
    [
        (plan("on_demand", devices=6), "devices=6 of a layer with 5 experts; give at most one for each"),
        (
            plan("resident", expert_flow="host_compute", devices=2),
            "expert_flow=host_compute is built for one device",
        ),
        (plan("on_demand", devices=3), "devices=3 and this process has 1; give at most as many"),
        (plan("specmoe", placement="popularity"), "placement=popularity has no effect on one device; leave it out"),
        (plan("streaming", placement="popularity", devices=2), "placement=popularity has no effect with expert_flow=stream"),
        (plan("on_demand", devices=0), "devices is 0; it must be a whole number of at least 1"),
    ],
)
def test_refused(a_plan, said):
    with pytest.raises(sm.PlanError) as e:
        sm.Engine(tiny(), a_plan)
    assert said in str(e.value) and "\n" not in str(e.value)
