"""The store on an accelerator of its own: what is on its way, and what is in the pool."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.models.model import to_host
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.offload.tiers import HostTier

SHAPE, EXPERTS, SLOTS = (3, 2, 4), 6, 4
copies = st.tuples(st.integers(0, EXPERTS - 1), st.integers(0, SLOTS - 1))


@pytest.fixture(scope="module")
def tier():
    return HostTier((tuple(to_host(np.full(SHAPE, 1 + expert, np.float32)) for expert in range(EXPERTS)),))


@settings(deadline=None)  # the first copies compile
@given(room=st.integers(0, 4), steps=st.lists(st.tuples(st.lists(copies, max_size=5), st.lists(st.integers(0, SLOTS - 1)))))
def test_what_has_landed_is_what_was_last_sent(tier, room, steps):
    store, wanted = ExpertStore(tier, Link(), room=room), np.zeros(SLOTS)
    pool, arriving = store.new_pool(SLOTS), ()
    for sent, read in steps:
        pool, arriving = store.fetch(pool, [(0, expert, slot) for expert, slot in sent], arriving)
        assert len(arriving) <= room
        for expert, slot in sent:
            wanted[slot] = 1 + expert
        pool, arriving = store.finish_copies(pool, arriving, np.array(read, np.int64))
        assert not set(read) & {one.slot for one in arriving}
        assert (np.asarray(pool)[read] == wanted[read][:, None, None, None]).all()
    pool, arriving = store.finish_copies(pool, arriving)
    assert arriving == ()
    assert (np.asarray(pool) == wanted[:, None, None, None]).all()


def test_what_has_arrived_lands_without_being_asked_for(tier):
    store = ExpertStore(tier, Link(), room=3)
    pool, arriving = store.fetch(store.new_pool(SLOTS), [(0, 2, 1), (0, 3, 0)])
    assert [one.slot for one in arriving] == [1, 0]
    jax.block_until_ready([one.block for one in arriving])
    pool, arriving = store.finish_arrived(pool, arriving)
    assert arriving == ()
    assert np.asarray(pool)[:3, 0, 0, 0].tolist() == [4, 3, 0]


def test_few_programs_write_any_number_of_blocks(tier, compilations):
    store = ExpertStore(tier, Link())
    pool, _ = store.fetch(store.new_pool(SLOTS), [])
    before = compilations.count
    for count in range(EXPERTS + 1):
        pool, _ = store.fetch(pool, [(0, expert, expert % SLOTS) for expert in range(count)])
    assert compilations.count == before
    assert np.asarray(pool)[:, 0, 0, 0].tolist() == [5, 6, 3, 4]
    assert store.link.sent_bytes == (1 + sum(range(EXPERTS + 1))) * np.zeros(SHAPE, np.float32).nbytes


def test_there_is_room_for_so_many_copies(tier):
    store = ExpertStore(tier, Link(), room=3)
    assert store.copies_within(1.0, under_way=1) == 2
    assert ExpertStore(tier, Link()).copies_within(1.0) == EXPERTS
    slow = ExpertStore(tier, Link(bytes_per_s=96.0), room=3)  # a block a second
    assert slow.copies_within(1.5) == 1
    assert slow.copies_within(9.0) == 3


def test_a_streamed_layer_is_whole(tier):
    store = ExpertStore(tier, Link(), room=2)
    buffer = store.stream(store.new_buffer(), 0)
    assert np.asarray(buffer)[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("room", [0, 3])
def test_layers_that_are_packed_differently(room):
    """A slot has room for the largest block; a smaller one fills its front, and its own bytes are counted."""
    sizes = (6, 4)
    tier = HostTier(tuple(tuple(to_host(np.full(size, 10 * size + e, np.uint8)) for e in range(EXPERTS)) for size in sizes))
    store = ExpertStore(tier, Link(), room=room)
    pool = store.new_pool(SLOTS)
    assert pool.shape == (SLOTS, 6) and store.link.sent_bytes == sum(sizes)
    copies = [(0, 0, 0), (1, 1, 1), (1, 2, 2), (0, 3, 3)]
    pool, _ = store.finish_copies(*store.fetch(pool, copies, ()))
    for layer, expert, slot in copies:
        assert (np.asarray(pool)[slot, : sizes[layer]] == 10 * sizes[layer] + expert).all()
    assert store.link.sent_bytes == sum(sizes) + 2 * sum(sizes)
    before = store.link.sent_bytes
    buffer = store.stream(store.new_buffer(), store.send_for(1))
    assert store.link.sent_bytes == before + EXPERTS * 4
    assert (np.asarray(buffer)[:, :4] == 40 + np.arange(EXPERTS)[:, None]).all()
