"""Several jobs open on one engine at a time: each runs on the resources that it was taken with, and none sees another's."""

import pytest
from engine_cases import plan, tokens_of

import specmoe_jax as sm
from specmoe_jax.testing import eagle_head

PARAMS = sm.SamplingParams(max_new_tokens=20, ignore_eos=True)
LARGE = [[7 * i + 1, 90 + i, 3 * i + 5] for i in range(6)]


def finish(events):
    """Tokens of each request of a stream, from what is left of it."""
    return {event.id: event.completion.token_ids for event in events if event.completion is not None}


def expected(model, prompts, params=PARAMS):
    return dict(enumerate(tokens_of(sm.Engine(model, plan("resident", batch_size=16)).generate(prompts, params))))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["small first", "large first"])
def test_pinned_layers_of_two_streams(model, order):
    """Alone the short job has room to pin every layer, nine long rows leave none."""
    a_plan = plan("streaming", batch_size=9, draft="ngram", draft_length=6, device_memory_bytes=1979396)
    jobs = [[[1, 2, 3, 4, 5]], [list(range(60))] * 9]
    check_interleaved(model, sm.Engine(model, a_plan), jobs if order == "small first" else jobs[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["small first", "large first"])
def test_a_whole_and_a_split_draft_cache(model, order):
    a_plan = plan("streaming", batch_size=2, draft="eagle", draft_length=1, draft_kv_bytes=33000)
    jobs = [[[1, 2, 3]], [list(range(70))] * 2]
    engine = sm.Engine(model, a_plan, draft_head=eagle_head(model))
    check_interleaved(model, engine, jobs if order == "small first" else jobs[::-1])


def check_interleaved(model, engine, jobs):
    streams = [engine.stream(prompts, PARAMS) for prompts in jobs]
    for stream in streams:
        next(stream)
    for stream, prompts in zip(streams, jobs, strict=True):
        assert finish(stream) == expected(model, prompts)
    assert finish(engine.stream(jobs[0], PARAMS)) == expected(model, jobs[0])  # on what they left


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"draft": "self", "draft_length": 2, "draft_experts": 2}, {"retain": True}], ids=str)
def test_a_pool_that_a_smaller_job_puts_back_is_not_a_larger_ones(model, changes):
    engine = sm.Engine(model, plan("on_demand", batch_size=6, prefill_chunk=1, **changes))
    want, alone = expected(model, LARGE), expected(model, [[1, 2, 3]])
    small = engine.stream([[1, 2, 3]], PARAMS)
    next(small)
    assert finish(engine.stream(LARGE, PARAMS)) == want
    assert finish(small) == alone
    assert finish(engine.stream(LARGE, PARAMS)) == want


@pytest.mark.parametrize("preset", ["on_demand", "streaming"])
def test_states_of_the_functional_face_run_side_by_side(model, preset):
    engine = sm.Engine(model, plan(preset, batch_size=6))
    states = {"small": engine.init([[1, 2, 3]], PARAMS), "large": engine.init(LARGE, PARAMS)}
    while not all(state.done for state in states.values()):
        states = {name: state if state.done else engine.step(state)[0] for name, state in states.items()}
    assert states["small"].generated[0] == expected(model, [[1, 2, 3]])[0]
    assert dict(enumerate(states["large"].generated[: len(LARGE)])) == expected(model, LARGE)
