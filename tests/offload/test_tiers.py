"""The disk tier gives the blocks of the files, reads each once while it is kept, and holds no more than it may."""

import concurrent.futures
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.registry import HOST_CACHE_POLICIES
from specmoe_jax.offload.tiers import DiskTier, HostTier

L, E = 3, 4


class Files:
    """As checkpoints.disk.DiskExperts; `gate` holds reads back until it is set."""

    shape, block_shape, block_dtype = (L, E), (3, 2, 2), np.dtype(np.float32)
    block_shapes = (block_shape,) * L

    def __init__(self):
        self.begun, self.reads, self.dropped, self.gate = [], [], False, threading.Event()
        self.gate.set()

    def stored_bytes(self, layer, expert):
        return 10

    def read(self, layer, expert, *, keep_pages):
        self.begun.append((layer, expert))
        self.gate.wait(10)
        self.reads.append((layer, expert))
        return np.full(self.block_shape, layer * E + expert, np.float32)

    def drop_pages(self):
        self.dropped = True


def tier(capacity, policy="lru", files=None, keep_pages=True):
    return DiskTier(files or Files(), capacity=capacity, policy=HOST_CACHE_POLICIES.executor(policy), keep_pages=keep_pages)


def value(block):
    return np.unique(np.asarray(block)).tolist()


def expected(*keys):
    predicted = np.zeros((L, E), np.int64)
    for key in keys:
        predicted[key] = 1
    return predicted


@settings(deadline=None, max_examples=30)
@given(
    rounds=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, L - 1), st.integers(0, E - 1)), max_size=E, unique=True),
            st.lists(st.tuples(st.integers(0, L - 1), st.integers(0, E - 1)), max_size=4),
        ),
        max_size=10,
    ),
    capacity=st.integers(1, L * E),
    policy=st.sampled_from(list(HOST_CACHE_POLICIES)),
)
def test_every_block_is_the_right_one(rounds, capacity, policy):
    disk = tier(capacity, policy)
    for wanted, predicted in rounds:
        disk.read_ahead(expected(*predicted))
        disk.request(wanted)
        for layer, expert in wanted:
            assert value(disk.block((layer, expert))) == [layer * E + expert]
            assert len(disk._blocks) <= capacity
    assert disk.counts.disk_bytes >= 10 * len(disk._files.reads)


def test_each_is_read_once_while_it_is_kept():
    disk = tier(2)
    for _ in range(3):
        disk.request([(0, 1), (2, 3)])
        assert [value(disk.block(key)) for key in ((0, 1), (2, 3))] == [[1], [11]]
    assert sorted(disk._files.reads) == [(0, 1), (2, 3)]
    assert disk.counts == (20, 4, 2)


def test_a_layer_larger_than_the_cache():
    disk = tier(2)
    keys = [(1, e) for e in range(E)]
    disk.request(keys)
    assert [value(disk.block(key)) for key in keys] == [[4], [5], [6], [7]]
    assert disk.counts == (40, 0, 4) and len(disk._blocks) == 2


def test_read_ahead_brings_it_before_it_is_asked_for():
    disk = tier(4)
    disk.read_ahead(expected((0, 1), (1, 0), (2, 2)))
    while not disk.ready()[1, 0]:
        pass
    np.testing.assert_array_equal(np.argwhere(disk.ready() | disk._reading()), [[0, 1], [1, 0]])  # half of the cache
    disk.request([(0, 1)])
    disk.block((0, 1))
    assert disk.counts == (20, 1, 0)


def test_what_is_demanded_overtakes_what_is_read_ahead():
    disk = tier(8)
    disk._files.gate.clear()
    disk.read_ahead(expected((0, 0), (0, 1), (0, 2), (0, 3)))
    disk.request([(0, 3)])
    while len(disk._files.begun) < 2:
        pass
    assert set(disk._files.begun) == {(0, 0), (0, 3)}  # it waits for none but itself
    disk._files.gate.set()
    assert value(disk.block((0, 3))) == [3]
    assert disk.counts.disk_bytes == 40  # counted once


def test_reads_in_flight_are_not_evicted():
    disk = tier(2)
    disk._files.gate.clear()
    disk.request([(0, 0), (0, 1)])
    threading.Timer(0.05, disk._files.gate.set).start()
    disk.request([(1, 0)])
    assert value(disk.block((1, 0))) == [4]
    assert len(disk._blocks) == 2


def test_an_error_of_the_disk_reaches_the_caller():
    disk = tier(2)
    disk._files.read = lambda *key, keep_pages: 1 / 0
    disk.request([(0, 0)])
    with pytest.raises(ZeroDivisionError):
        disk.block((0, 0))


def test_a_read_that_failed_is_tried_again():
    """Each of those that failed together, by whoever asks for it next."""
    disk = tier(2)
    read, disk._files.read = disk._files.read, lambda *key, keep_pages: 1 / 0
    disk.request([(0, 0), (0, 1)])
    concurrent.futures.wait(disk._blocks.values())
    with pytest.raises(ZeroDivisionError):
        disk.block((0, 0))
    disk._files.read = read
    disk.request([(0, 0), (0, 1)])
    assert [value(disk.block((0, expert))) for expert in (0, 1)] == [[0], [1]]


def test_pages_are_dropped_only_when_asked():
    assert not tier(1)._files.dropped
    assert tier(1, keep_pages=False)._files.dropped


def test_host_tier_is_always_ready():
    experts = tuple(tuple(np.full((3, 2, 2), l * E + e, np.float32) for e in range(E)) for l in range(L))
    host = HostTier(experts)
    assert [value(block) for block in host.blocks([(0, 0), (2, 1)])] == [[0], [9]]
    host.read_ahead(expected((0, 0)))
    assert host.ready().all() and host.num_experts == L * E and host.counts == (0, 0, 0)
    assert value(host.block((2, 1))) == [9]
