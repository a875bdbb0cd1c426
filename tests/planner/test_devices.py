"""Several devices: the account and the time of one, and the table of `explain`."""

import dataclasses

import numpy as np
import pytest

from specmoe_jax.config.presets import preset
from specmoe_jax.planner import explain, routing
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory import fit
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import PlanError
from tests.planner.planner_cases import MIXTRAL

WORKLOAD = Workload(prompt_tokens=512, new_tokens=128)
HOST = machine("4090").replace(dram_bytes_per_s=1e12, devices=8, host_memory_bytes=1e12)  # of which no link is short


def plan(name, **changes):
    return preset(name, MIXTRAL).replace(dtype="bfloat16", batch_size=16, **changes)


@pytest.mark.parametrize(("count", "experts", "devices"), [(5.0, 8, 4), (64.0, 128, 8), (100.0, 128, 8), (1.0, 8, 2)])
def test_the_busiest_device_is_that_of_a_random_draw(count, experts, devices):
    """Within a tenth of 20,000 draws; one device has all, and all experts are spread evenly."""
    rng = np.random.default_rng(0)
    used = rng.random((20_000, experts)).argsort(axis=1)[:, : int(count)] % devices
    drawn = np.stack([(used == device).sum(axis=1) for device in range(devices)]).max(axis=0).mean()
    assert routing.busiest(count, experts, devices) == pytest.approx(drawn, rel=0.1)
    assert routing.busiest(count, experts, 1) == count
    assert routing.busiest(float(experts), experts, devices) == experts / devices


def test_what_devices_keep_in_equal_shares_is_not_drawn():
    """All that is absent: 28 of 32 are seven for each of four devices; of eight without one some device has both of its own."""
    assert routing.busiest(28.0, 32, 4, kept=4) == 7 < routing.busiest(28.0, 32, 4)
    assert routing.busiest(7.0, 8, 4, kept=1) == routing.busiest(7.0, 7, 4) == 2


@pytest.mark.parametrize("name", ["streaming", "on_demand", "specmoe"])
def test_links_add_up_where_they_bind(name):
    few = {"draft_experts": 1} if name == "specmoe" else {}
    found = {n: predict(MIXTRAL, plan(name, devices=n, **few), HOST, WORKLOAD, interval=False) for n in (1, 2, 4)}
    assert found[1].binding == "link to accelerator"
    assert 1.6 < found[2].tokens_per_s / found[1].tokens_per_s < 2.1
    assert 2.6 < found[4].tokens_per_s / found[1].tokens_per_s < 4.1
    assert found[4].link_bytes_per_token == pytest.approx(found[1].link_bytes_per_token)  # over all links
    assert found[4].account.accelerator_bytes < found[1].account.accelerator_bytes
    assert found[4].busy_s["links between devices"] > 0 == found[1].busy_s["links between devices"]


def test_host_memory_is_shared():
    """Four links of 25.6 GB/s of a host that reads 60."""
    slow = predict(MIXTRAL, plan("streaming", devices=4), HOST.replace(dram_bytes_per_s=60e9), WORKLOAD, interval=False)
    fast = predict(MIXTRAL, plan("streaming", devices=4), HOST, WORKLOAD, interval=False)
    assert slow.busy_s["link to accelerator"] == pytest.approx(25.6 / 15 * fast.busy_s["link to accelerator"], rel=0.01)


def test_what_is_refused():
    few, unknown = HOST.replace(devices=2), HOST.replace(peer_bytes_per_s=0.0)
    for hardware, said in ((few, "has 2; give at most as many"), (unknown, "has no peer_bytes_per_s")):
        with pytest.raises(PlanError, match=said):
            predict(MIXTRAL, plan("on_demand", devices=4), hardware, WORKLOAD)
    with pytest.raises(PlanError, match="devices is 0"):
        HOST.replace(devices=0)


def test_the_table_grows_from_one_to_eight():
    table = explain.devices(MIXTRAL, plan("streaming"), HOST.replace(devices=1), WORKLOAD)["devices"]
    assert list(table) == ["1", "2", "4", "8"]
    rates, memory = ([row[name] for row in table.values()] for name in ("tokens_per_s", "accelerator_gib"))
    assert rates == sorted(rates) and memory == sorted(memory, reverse=True)
    assert table["1"]["times"] == 1 and table["2"]["link_bytes_per_token"] < 0.51 * table["1"]["link_bytes_per_token"]


def test_hosts_hold_the_experts_together_and_are_joined_by_a_network():
    host, many = machine("h100_host"), dataclasses.replace(MIXTRAL, num_experts=64, expert_hidden=2048)
    table = explain.devices(many, plan("on_demand"), host, WORKLOAD)["devices"]
    assert list(table) == ["1", "2", "4", "8", "16", "32", "64"] and [row["hosts"] for row in table.values()] == [1] * 4 + [2, 4, 8]
    small = host.replace(host_memory_bytes=60e9, network_bytes_per_s=1e7)  # experts of 103 GB
    table = explain.devices(many, plan("on_demand"), small, WORKLOAD)["devices"]
    assert "cannot run" in table["8"] and table["16"]["binding_resource"] == "network between hosts"


def test_each_host_reads_its_own_memory():
    """Eight links of a host share 500 GB/s; those of two hosts twice that."""
    host = machine("h100_host").replace(dram_bytes_per_s=100e9)
    one, two = (
        predict(MIXTRAL, plan("streaming", devices=8), own, WORKLOAD, interval=False).busy_s["link to accelerator"]
        for own in (host, host.replace(hosts=2))
    )
    assert one == pytest.approx(2 * two, rel=0.01)


def test_each_device_has_the_cache_of_its_rows():
    """Half of it on two; all of it of rows that are no multiple, of rows beside the batch, and in host memory."""

    def kv_bytes(devices: int, rows: int, *, beside: int = 0, **changes) -> int:
        own = plan("on_demand", devices=devices, **changes)
        return account(MIXTRAL, own, batch_rows=rows, positions=64, beside_rows=beside).kv_bytes

    one = kv_bytes(1, 1)
    assert [kv_bytes(devices, 16) for devices in (1, 2, 4)] == [16 * one, 8 * one, 4 * one]
    assert [kv_bytes(2, 15), kv_bytes(4, 6)] == [15 * one, 6 * one]
    assert kv_bytes(4, 16, beside=8) == (4 + 8) * one
    assert kv_bytes(4, 16, kv_tier="host") == 16 * one


def test_the_largest_batch_is_one_that_is_divided():
    found = [fit.largest_batch(MIXTRAL, plan("on_demand", devices=devices), HOST, WORKLOAD) for devices in (1, 3)]
    assert found[1] > 1.5 * found[0] and found[1] % 3 == 0
    alone = HOST.replace(
        accelerator_memory_bytes=account(MIXTRAL, plan("on_demand"), batch_rows=1, positions=704).accelerator_bytes
    )
    assert fit.largest_batch(MIXTRAL, plan("on_demand", devices=3), alone, WORKLOAD) > 0


def test_the_attention_of_divided_rows_takes_less_time():
    """At many rows of a long context and experts that are all there."""
    long = Workload(prompt_tokens=8192, new_tokens=128)
    own = machine("h100").replace(devices=8, host_memory_bytes=1e12)
    plans = [plan("resident", devices=8).replace(batch_size=rows) for rows in (15, 16)]
    found = [predict(MIXTRAL, one, own, long, interval=False) for one in plans]
    assert found[1].busy_s["accelerator"] < 0.7 * found[0].busy_s["accelerator"]
