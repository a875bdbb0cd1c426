"""Steps of a service run the rows that are active, where they are few, and nobody's tokens tell."""

import pytest
from engine_cases import plan

import specmoe_jax as sm
from specmoe_jax.engine.service import few_rows
from specmoe_jax.testing import eagle_head
from specmoe_jax.testing.families import tiny_family

PARAMS = sm.SamplingParams(max_new_tokens=5, ignore_eos=True)


def opened(engine, **how):
    """A service after its first request, whose row was computed alone or among all."""
    service = engine.service(max_tokens=32, **how)
    return service, service.submit([3, 1, 4], PARAMS)


@pytest.fixture
def parts(monkeypatch):
    """Rows of the parts that steps ran."""
    seen, part_of = [], few_rows.part_of
    monkeypatch.setattr(few_rows, "part_of", lambda state, rows: (seen.append(rows.tolist()), part_of(state, rows))[1])
    return seen


def test_sizes_follow_the_active_rows(model, parts):
    service, first = opened(sm.Engine(model, plan("resident", batch_size=8)))
    service.step()
    assert parts[0] == [0] and [0, 1, 2, 3] in parts  # both were compiled, greedy and sampled
    del parts[:]
    others = [service.submit([number, 7], PARAMS) for number in range(3)]
    service.step()
    assert [len(rows) for rows in parts] == [4]
    more = [service.submit([number, 9], PARAMS) for number in range(2)]
    service.step()
    assert [len(rows) for rows in parts] == [4]  # six active rows take all eight
    service.run()
    assert all(handle.done for handle in (first, *others, *more))
    assert len(parts[-1]) < 8 and service._session.figures.recompiled == 0


def test_what_ended_in_other_rows_is_kept(model, parts):
    """The next turn of a conversation goes on from a row that no step ran meanwhile."""
    engine = sm.Engine(model, plan("resident", batch_size=4))
    service = engine.service(max_tokens=64)
    long = list(range(1, 30))
    told = service.submit(long, PARAMS)
    service.run()
    service.submit([200, 201], PARAMS)
    service.run()
    before = engine.stats()["prefill_tokens"]
    turn = service.submit([*long, *told.completion.token_ids, 5], PARAMS)
    service.run()
    assert engine.stats()["prefill_tokens"] - before <= 3
    (alone,) = sm.Engine(model, plan("resident", batch_size=1)).generate([[*long, *told.completion.token_ids, 5]], PARAMS)
    assert turn.completion.token_ids == alone.token_ids and all(len(rows) == 1 for rows in parts[-3:])


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("streaming", {}),
        ("specmoe", {"kv_tier": "host", "draft_experts": 2, "draft_length": 2}),
        ("on_demand", {"draft": "eagle", "draft_length": 2}),
        ("on_demand", {"draft": "eagle", "draft_tree_top_k": 2, "draft_tree_tokens": 4, "draft_length": 2}),
    ],
    ids=str,
)
def test_where_more_than_the_cache_is_a_row_s_all_rows_run(model, parts, preset, changes):
    heads = {"draft_head": eagle_head(model)} if "draft" in changes else {}
    service, handle = opened(sm.Engine(model, plan(preset, batch_size=4, **changes), **heads))
    service.run()
    assert handle.done and not parts


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "gpt_oss", "qwen3_next", "llama4"])
def test_families(family, parts):
    model = tiny_family(family)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [1, 8, 2, 8]]
    want = sm.Engine(model, plan("resident", batch_size=1)).generate(prompts, PARAMS)
    service = sm.Engine(model, plan("on_demand", batch_size=8)).service(max_tokens=64)
    handles = [service.submit(prompts[0], PARAMS)]
    service.step()
    handles += [service.submit(prompt, PARAMS) for prompt in prompts[1:]]
    service.run()
    assert [handle.completion.token_ids for handle in handles] == [one.token_ids for one in want]
    assert bool(parts) != (family == "qwen3_next")  # recurrent layers
