"""The simulator: nothing starts before what it waits for, a resource does one thing at a time, and times known by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.offload.stream_schedule import KINDS, pass_tasks, spread
from specmoe_jax.planner import simulate as module
from specmoe_jax.planner.simulate import naive_seconds, simulate

DURATIONS = st.fixed_dictionaries({kind: st.integers(0, 20).map(float) for kind in KINDS})


def run(seconds, layers=(True,) * 3, items=2, chunks=2, **options):
    return simulate(pass_tasks(tuple(layers), items, chunks), lambda task: seconds.get(task.kind, 0.0), **options)


@given(
    DURATIONS,
    st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 3),
    st.frozensets(st.integers(0, 3)),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_order_edges_and_exclusive_resources_hold(seconds, layers, items, chunks, pinned, prompts, recurrent, accelerator_is_cpu):
    recurrent = tuple(sorted(layer for layer in recurrent if layer < len(layers)))
    moe = tuple(layer for layer, has in enumerate(layers) if has)
    stay = spread(moe, min(pinned, len(moe)))
    tasks = pass_tasks(tuple(layers), items, chunks, pinned=stay, prompts=min(prompts, items), recurrent=recurrent)
    across = ("to_host", "attention", "to_accelerator", "attend_chunk", "store", "append")
    assert not any(task.kind in across for task in tasks if task.layer in recurrent)
    assert sorted(task.layer for task in tasks if task.kind == "recur") == sorted(items * recurrent)
    assert len(stay) == min(pinned, len(moe))
    assert sorted(task.layer for task in tasks if task.kind == "stream") == sorted(chunks * [n for n in moe if n not in stay])
    nodes = module._unroll(tasks, [seconds[task.kind] for task in tasks], draft_s=3.0)
    starts, ends, causes = module._schedule(nodes, accelerator_is_cpu)
    for i, node in enumerate(nodes):
        assert all(ends[place] <= starts[i] for place in node.after)
        assert ends[i] == starts[i] + node.seconds
        assert starts[i] == 0 or (causes[i] is not None and ends[causes[i]] == starts[i])  # nothing idles without a reason
    for server in {module._server(node.resource, accelerator_is_cpu) for node in nodes}:
        own = sorted(
            (starts[i], ends[i]) for i, node in enumerate(nodes) if module._server(node.resource, accelerator_is_cpu) == server
        )
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))


@given(DURATIONS, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_shared_cores_are_never_faster_and_drafting_adds_at_most_itself(seconds, items):
    apart = run(seconds, items=items)
    assert run(seconds, items=items, accelerator_is_cpu=True).iteration_s >= max(apart.busy_s.values())
    assert run(seconds, items=items, draft_s=5.0).iteration_s <= apart.iteration_s + 5.0 + max(seconds.values()) * len(KINDS)


def test_a_link_that_binds_is_all_that_counts():
    """3 layers of 2 chunks of 10 s: 60 s, whatever short things happen beside them."""
    found = run({"stream": 10.0, "attention": 1.0, "experts": 1.0}, items=1)
    assert found.iteration_s == 60.0
    assert {span.kind for span in found.critical} >= {"stream"}


@pytest.mark.parametrize("pinned, link_s", [((1, 3), 40.0), ((2, 3), 40.0), ((0, 1, 2, 3), 0.0)])
def test_pinned_layers_leave_the_link_to_the_others(pinned, link_s):
    """4 layers of 2 chunks of 10 s, of which the pinned ones do not cross; what else there is takes 4 x 2 s."""
    tasks = pass_tasks((True,) * 4, 1, 2, 2, pinned)
    found = simulate(tasks, lambda task: {"stream": 10.0, "attention": 1.0, "experts": 1.0}.get(task.kind, 0.0))
    assert found.busy_s["link to accelerator"] == link_s
    assert found.iteration_s == max(link_s, 8.0)


def test_drafting_hides_the_stream_of_the_next_layer():
    """Attention and experts alone: 3 layers of 2 + 3 s, and 7 s of drafting, in which the link of 1 s a layer is idle or ahead."""
    assert run({"attention": 2.0, "experts": 3.0, "stream": 0.5}, items=1, draft_s=7.0).iteration_s == 3 * 5.0 + 7.0


def test_two_micro_batches_overlap_attention_with_experts():
    """One item: 4 + 4 s a layer; two of half the size: the CPU is busy 4 s a layer and waits for the experts of one half only."""
    one = run({"attention": 4.0, "experts": 4.0}, items=1).iteration_s
    two = run({"attention": 2.0, "experts": 2.0}, items=2).iteration_s
    assert one == 24.0
    assert two == pytest.approx(3 * 4.0 + 2.0)


def test_a_prompt_fills_the_wait_for_the_cpu():
    """A layer's decoding item waits 4 s for the CPU's attention; the prompt's 1 + 3 s run meanwhile."""
    seconds = {"attention": 4.0, "attend_chunk": 1.0, "experts": 3.0, "append": 0.5}
    took = {n: simulate(pass_tasks((True,) * 3, 2, 1, prompts=n), lambda task: seconds.get(task.kind, 0.0)) for n in (0, 1)}
    assert took[1].iteration_s == 3 * (4.0 + 3.0)
    assert took[0].iteration_s == 6 * 4.0 + 3.0  # both attend on the CPU, one after the other


def test_shared_cores_cannot_overlap_them():
    assert run({"attention": 2.0, "experts": 2.0}, items=2, accelerator_is_cpu=True).iteration_s == 24.0


def test_urgent_copies_go_before_weights():
    """The copy back waits for one chunk at most: cut finer, the pass is shorter."""
    coarse = run({"stream": 8.0, "to_accelerator": 1.0, "attention": 3.0, "experts": 4.0}, items=1, chunks=1).iteration_s
    fine = run({"stream": 1.0, "to_accelerator": 1.0, "attention": 3.0, "experts": 4.0}, items=1, chunks=8).iteration_s
    assert fine < coarse


def test_what_does_not_overlap_is_added():
    whole = run({"stream": 10.0, "experts": 5.0}, items=1)
    assert run({"stream": 10.0, "experts": 5.0}, items=1, overlap=0.5).iteration_s == whole.iteration_s + 0.5 * 15.0


def test_the_naive_estimator_takes_the_busiest_resource_of_each_layer():
    tasks = pass_tasks((True, False, True), 2, 2)
    seconds = {"stream": 5.0, "attention": 3.0, "experts": 1.0}
    assert naive_seconds(tasks, lambda task: seconds.get(task.kind, 0.0), draft_s=2.0) == 2.0 + 10.0 + 6.0 + 10.0


def test_the_critical_path_spans_the_iteration():
    found = run({"stream": 2.0, "attention": 3.0, "experts": 4.0, "pre_attention": 1.0}, draft_s=2.0)
    assert found.critical[-1].kind == module.DRAFT
    assert found.critical[-1].end_s == pytest.approx(found.iteration_s)
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(found.critical))
