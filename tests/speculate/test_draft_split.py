"""Who drafts with a cache in host memory: never over the accelerator's pages, monotone under growth, few moves a request."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.speculate.drafts.draft_split import no_split, plan_draft_split

MOST_MOVES = 3


def step(split, requests, pages, most, capacity):
    return plan_draft_split(split, np.array(requests), np.array(pages), np.array(most), capacity)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_history_of_joins_growth_and_ends(data):
    rows, capacity = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    split, who = no_split(rows), np.full(rows, -1)
    pages, most = np.zeros((2, rows), int)
    side, moves, served = {}, {}, 0
    for _ in range(data.draw(st.integers(1, 25))):
        ended = False
        for row in range(rows):
            what = data.draw(st.sampled_from(["grow", "grow", "stay", "end", "replace"]))
            if who[row] >= 0 and what == "grow":
                pages[row] = min(pages[row] + data.draw(st.integers(0, 2)), most[row])
            elif who[row] >= 0 and what == "end":
                who[row], pages[row], most[row], ended = -1, 0, 0, True
            elif what == "replace":
                ended |= bool(who[row] >= 0)
                who[row], served = served, served + 1
                pages[row] = data.draw(st.integers(1, 4))
                most[row] = pages[row] + data.draw(st.integers(0, 5))
        before = split
        split, out, back = plan_draft_split(before, who, pages, most, capacity)
        here = (who >= 0) & ~split.on_cpu
        assert pages[here].sum() <= capacity
        assert not split.on_cpu[who < 0].any()
        changed = {row for row in range(rows) if before.requests[row] == who[row] >= 0 and before.on_cpu[row] != split.on_cpu[row]}
        assert changed == {*out, *back} and len(changed) == len(out) + len(back)
        assert all(split.on_cpu[row] for row in out) and not any(split.on_cpu[row] for row in back)
        if not ended:
            assert back == ()
        for row in changed:
            moves[who[row]] = moves.get(who[row], 0) + 1
        if back:  # room to grow to the end
            assert most[here].sum() <= capacity
        side.update({int(request): bool(cpu) for request, cpu in zip(who, split.on_cpu, strict=True) if request >= 0})
    assert all(count <= MOST_MOVES for count in moves.values())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 20), st.lists(st.integers(0, 7), max_size=40))
def test_growth_alone_only_sends_rows_to_the_cpu(lengths, capacity, growing):
    """Each at most once, and nobody while all fit."""
    rows, pages = len(lengths), np.array(lengths)
    most, who = pages + len(growing), np.arange(len(lengths))
    split, moved = no_split(rows), []
    for row in (0, *growing):
        pages[row % rows] += 1
        split_before = split.on_cpu
        split, out, back = plan_draft_split(split, who, pages, most + 1, capacity)
        assert back == () and (split_before <= split.on_cpu).all()
        moved += out
        assert split.on_cpu.any() or pages.sum() <= capacity
    assert len(set(moved)) == len(moved)


def test_the_longest_leaves_first_and_comes_back_when_another_ends():
    split, out, back = step(no_split(3), [0, 1, 2], [2, 3, 1], [4, 6, 3], 6)
    assert out == back == () and not split.on_cpu.any()
    split, out, _ = step(split, [0, 1, 2], [3, 4, 1], [4, 6, 3], 6)
    assert out == (1,)
    split, out, back = step(split, [-1, 1, 2], [0, 5, 2], [0, 6, 3], 8)
    assert back == out == ()  # all of both would need 9
    split, out, back = step(split, [-1, 1, -1], [0, 5, 0], [0, 6, 0], 8)
    assert back == (1,)


def test_accelerator_memory_first_for_those_that_join():
    split, *_ = step(no_split(3), [0, 1, 2], [3, 3, 1], [9, 9, 9], 4)
    assert split.on_cpu.tolist() == [False, True, False]
    split, *_ = step(split, [3, 1, 2], [2, 3, 1], [9, 9, 9], 4)
    assert split.on_cpu.tolist() == [False, True, False]
