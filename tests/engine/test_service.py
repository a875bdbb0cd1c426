"""Requests that join and leave a running batch: the tokens of each are the offline engine's, whoever comes and goes."""

import threading

import numpy as np
import pytest
from engine_cases import plan

import specmoe_jax as sm
from specmoe_jax.engine.service.joins import plan_joins
from specmoe_jax.engine.service.service import Service
from specmoe_jax.kv_cache.page_table import Pages
from specmoe_jax.support.errors import QueueFull
from specmoe_jax.testing import TINY, eagle_head
from specmoe_jax.testing.families import tiny_family

CASES = {
    "specmoe": dict(batch_size=3, draft_experts=2, draft_length=3),
    "on_demand": dict(batch_size=3),
    "streaming": dict(batch_size=3, micro_batches=1),
    "resident": dict(batch_size=2),
    "eagle": dict(preset="specmoeoff", batch_size=4, draft_length=2),
    "eagle_cache": dict(preset="on_demand", batch_size=3, draft="eagle", draft_length=2),
    "merged": dict(preset="specmoe", batch_size=2, draft="merged", draft_experts=2, draft_length=2),
    "ngram": dict(preset="resident", batch_size=3, draft="ngram", draft_length=2),
    "few_of_eight": dict(preset="specmoe", batch_size=8, draft_experts=2, draft_length=3),
    "few_without_a_draft": dict(preset="resident", batch_size=8, expert_flow="host_compute"),
    "few_cached": dict(preset="caching", batch_size=8, cached_experts=2),
    "host_kv": dict(preset="specmoe", batch_size=2, draft_experts=2, draft_length=2, kv_tier="host"),
}


def engine_of(model, name, **changes):
    preset, options = CASES[name].get("preset", name), {}
    fields = {key: value for key, value in CASES[name].items() if key != "preset"} | {"deterministic_sampling": True} | changes
    if name.startswith("eagle"):
        options["draft_head"] = eagle_head(model)
    return sm.Engine(model, plan(preset, **fields), **options)


def requests(seed, count):
    """Prompts, some of which begin alike, and their parameters."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(0, 256, 24).tolist()
    found = []
    for number in range(count):
        own = rng.integers(0, 256, rng.integers(1, 14)).tolist()
        prompt = (begin[: rng.integers(8, 25)] + own) if rng.random() < 0.5 else own
        drawn = {"temperature": 0.9, "top_p": 0.95, "seed": number} if rng.random() < 0.4 else {}
        extra = {"logprobs": 2} if rng.random() < 0.2 else {"frequency_penalty": 0.7} if rng.random() < 0.15 else {}
        found.append((prompt, sm.SamplingParams(max_new_tokens=int(rng.integers(1, 14)), ignore_eos=True, **drawn, **extra)))
    return found


@pytest.fixture(scope="module")
def offline(model):
    """Completions of the resident engine, by the number of a request."""
    kept = {}

    def ask(seed, count):
        if (seed, count) not in kept:
            prompts, params = zip(*requests(seed, count), strict=True)
            engine = sm.Engine(model, plan("resident", batch_size=4, deterministic_sampling=True))
            kept[seed, count] = engine.generate(prompts, params)
        return kept[seed, count]

    return ask


def check(completion, want):
    assert completion.token_ids == want.token_ids and completion.finish_reason == want.finish_reason
    if want.logprobs is not None:
        assert [token.token_id for token in completion.logprobs] == [token.token_id for token in want.logprobs]
        found, wanted = ([token.logprob for token in one.logprobs] for one in (completion, want))
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", list(CASES))
def test_whoever_comes_and_goes_each_gets_its_own_tokens(model, offline, name):
    """A random campaign: at each step some are submitted, some cancelled."""
    seed, count = 3, 14
    want, todo = offline(seed, count), requests(seed, count)
    service = engine_of(model, name).service(max_tokens=64, max_waiting=count)
    rng, handles, events, stopped = np.random.default_rng(len(name)), {}, {number: [] for number in range(count)}, set()
    while len(handles) < count or not all(handle.done for handle in handles.values()):
        for number in range(len(handles), min(len(handles) + int(rng.integers(0, 4)), count)):
            prompt, params = todo[number]
            how = {"sampling_id": number, "background": bool(rng.random() < 0.3), "on_event": events[number].append}
            handles[number] = service.submit(prompt, params, **how)
        running = [number for number, handle in handles.items() if not handle.done]
        if running and rng.random() < 0.15:
            stopped.add(number := int(rng.choice(running)))
            handles[number].cancel()
        service.step()
    for number, handle in handles.items():
        completion, tokens = handle.completion, want[number].token_ids
        assert sum((event.token_ids for event in events[number]), ()) == completion.token_ids
        if completion.finish_reason == "cancelled":
            assert number in stopped and completion.token_ids == tokens[: len(completion.token_ids)]
        else:
            check(completion, want[number])
    assert 1 <= len(stopped) < count / 2 and not service.step()
    assert service.running == (0, 0)


def test_a_cancelled_request_frees_its_row_and_pages(model):
    service = engine_of(model, "streaming", batch_size=1).service(max_tokens=64)
    first = service.submit([1, 2, 3], sm.SamplingParams(max_new_tokens=40, ignore_eos=True))
    second = service.submit([4, 5], sm.SamplingParams(max_new_tokens=2, ignore_eos=True))
    for _ in range(3):
        service.step()
    assert not second.done and service.running == (1, 1)
    first.cancel()
    service.step()
    assert first.result().finish_reason == "cancelled" and len(first.completion.token_ids) == 2 and service.running == (1, 0)
    assert len(second.result().token_ids) == 2
    pages = service._state.kv.pages
    assert isinstance(pages, Pages) and (pages.table >= 0).sum() == 1  # of the last one, until its row is given away


def test_the_next_turn_reads_only_what_is_new(model, monkeypatch):
    """Its row still holds the turns before: no position of them goes through the model again."""
    service = engine_of(model, "on_demand").service(max_tokens=90)
    params = sm.SamplingParams(max_new_tokens=5, ignore_eos=True)
    prompt = list(range(40))
    other = service.submit([9, 9, 9], params)
    answer = service.submit(prompt, params).result().token_ids
    other.result()
    read = []
    executor = type(service._flow)
    run = executor.prompt_pass

    def spy(self, runtime, memory, kv, chunks, *rest):
        read.append(sum(int(chunk.num_new.sum()) for chunk in chunks))
        return run(self, runtime, memory, kv, chunks, *rest)

    monkeypatch.setattr(executor, "prompt_pass", spy)
    longer = [*prompt, *answer, 7, 8, 9]
    found = service.submit(longer, params).result()
    assert read == [len(longer) - 1 - (len(prompt) + len(answer) - 1)]
    assert found.token_ids == sm.Engine(model, plan("resident")).generate([longer], params)[0].token_ids


def test_joins_are_planned_by_what_rows_hold(model):
    service = engine_of(model, "on_demand").service(max_tokens=64)
    params = sm.SamplingParams(max_new_tokens=3, ignore_eos=True)
    long = list(range(100, 130))
    for prompt in (long, [1, 2, 3], [4]):
        service.submit(prompt, params).result()
    waiting = [request._replace(id=50 + i) for i, request in enumerate(r for r in service._state.requests if r)]
    waiting[1] = waiting[1]._replace(token_ids=(*long[:20], 1, 2))
    joins = plan_joins(service._state, waiting[:2], reuse=True)
    held = next(row for row, r in enumerate(service._state.requests) if r and r.token_ids == tuple(long))
    assert (joins[0].row, joins[0].source, joins[0].shared) == (held, held, 29)
    assert joins[1].shared == 0 and joins[1].row != held  # what the first one overwrites is no source any more
    assert all(join.shared == 0 for join in plan_joins(service._state, waiting, reuse=False))


def test_interactive_requests_go_first_and_the_queue_is_bounded(model):
    service = engine_of(model, "resident").service(max_tokens=64, max_waiting=2)
    params = sm.SamplingParams(max_new_tokens=3, ignore_eos=True)
    background = [service.submit([i + 1], params, background=True) for i in range(4)]
    service.step()
    assert service.running == (1, 3)  # one of two rows is kept
    people = [service.submit([i + 9], params) for i in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait and at most 2 may"):
        service.submit([5], params)
    for handle in people:
        handle.result()
    assert not all(handle.done for handle in background)
    service.run()
    assert all(handle.completion.finish_reason == "length" for handle in background)


def test_what_does_not_fit_is_refused(model):
    engine = engine_of(model, "resident")
    service = engine.service(max_tokens=32)
    with pytest.raises(sm.RequestError, match="the prompt has 30 tokens and max_new_tokens is 8, together 38; at most 32"):
        service.submit(list(range(30)), sm.SamplingParams(max_new_tokens=8))
    with pytest.raises(sm.RequestError, match="prompt 0 is empty"):
        service.submit([])
    for wrong in (1, TINY.max_positions + 1):
        with pytest.raises(sm.PlanError, match="max_tokens"):
            engine.service(max_tokens=wrong)


def test_a_failing_step_ends_what_had_rows_and_no_more(model, monkeypatch):
    engine = engine_of(model, "resident")
    service, params = engine.service(max_tokens=64), sm.SamplingParams(max_new_tokens=4, ignore_eos=True)
    (want,) = engine.generate([[3, 4]], params)
    first = service.submit([1, 2], params)
    service.step()
    with monkeypatch.context() as patch:
        patch.setattr(Service, "_counted_step", lambda *_: (_ for _ in ()).throw(RuntimeError("no link")))
        waits = service.submit([3, 4], params)
        with pytest.raises(RuntimeError, match="no link"):
            service.step()
    assert first.completion.finish_reason == "error" and "no link" in first.completion.error
    assert waits.completion.finish_reason == "error"
    assert service.submit([3, 4], params).result().token_ids == want.token_ids


def test_the_engine_has_a_service_of_its_own(model):
    engine = engine_of(model, "resident")
    params = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
    want = engine.generate([[1, 2, 3], [4, 5], [6]], params)
    handles = [engine.submit(prompt, params) for prompt in ([1, 2, 3], [4, 5], [6])]
    streamed = [token for event in handles[2] for token in event.token_ids]
    engine.run()
    assert tuple(streamed) == want[2].token_ids
    assert [handle.result().token_ids for handle in handles] == [one.token_ids for one in want]
    engine.cancel(handles[0])  # it has ended: nothing happens
    assert handles[0].result().finish_reason == "length"


def test_threads_share_a_service(model):
    engine = engine_of(model, "on_demand")
    params = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
    prompts = [[i + 1, 7 * i] for i in range(6)]
    want = [one.token_ids for one in engine.generate(prompts, params)]
    service, found = engine.service(max_tokens=64), {}

    def ask(number):
        found[number] = service.submit(prompts[number], params).result().token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == want
    service.close()
    assert service.running == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["specmoe", "streaming"])
def test_recurrent_states_are_of_the_request_that_has_the_row(preset):
    """A state cannot be cut at a position, so prompts that begin alike are read whole."""
    model = tiny_family("qwen3_next")
    rng = np.random.default_rng(5)
    begin = rng.integers(0, 131, 20).tolist()
    prompts = [[*begin, *rng.integers(0, 131, length).tolist()] if length % 2 else [length] for length in (3, 2, 7, 4, 5)]
    params = sm.SamplingParams(max_new_tokens=7, ignore_eos=True)
    want = sm.Engine(model, sm.PRESETS["resident"](model.config)).generate(prompts, params)
    changes = {"draft_experts": 2, "draft_length": 2} if preset == "specmoe" else {"micro_batches": 1}
    service = sm.Engine(model, sm.PRESETS[preset](model.config).replace(batch_size=2, **changes)).service(max_tokens=64)
    handles = []
    for prompt in prompts:
        handles.append(service.submit(prompt, params))
        service.step()
    assert [handle.result().token_ids for handle in handles] == [one.token_ids for one in want]
