"""expert_flow=stream gives the tokens of every other flow, whatever the micro-batches, the queue and the order of ends."""

import hypothesis
import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, ScriptedDraft, plan, run, tokens_of
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.engine.requests.status import EMPTY, finished
from specmoe_jax.engine.scheduler import admit, joined, prompt_chunks
from specmoe_jax.engine.state import HostKV, Request, State
from specmoe_jax.kv_cache.page_table import no_pages
from specmoe_jax.kv_cache.positions import KV_PAGE, pages_of
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.testing import TINY, eagle_head, tiny


@pytest.fixture(scope="module")
def expected():
    return run(tiny(), plan("resident", batch_size=8))[0]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("draft", [{}, {"draft": "ngram", "draft_length": 3}, {"draft": "ngram", "draft_length": 1}])
def test_greedy_tokens_are_those_of_the_resident_preset(expected, micro_batches, draft):
    got, stats = run(tiny(), plan("streaming", batch_size=8, micro_batches=micro_batches, **draft))
    assert got == expected
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.slow
def test_more_layer_buffers_bring_the_same_bytes_earlier(expected):
    got, stats = run(tiny(), plan("streaming", batch_size=3, micro_batches=3, layer_buffers=3, draft="ngram", draft_length=2))
    assert got == expected
    _, two = run(tiny(), plan("streaming", batch_size=3, micro_batches=3, draft="ngram", draft_length=2))
    layer = TINY.num_experts * TINY.expert_params * 4
    assert stats["link_bytes"] == two["link_bytes"]
    assert stats["peak_accelerator_bytes"] - two["peak_accelerator_bytes"] == layer


@pytest.mark.slow
@pytest.mark.parametrize("rows, micro_batches", [(1, 1), (2, 2), (3, 1), (5, 2)])
def test_a_queue_longer_than_the_batch_gives_the_same_tokens(expected, rows, micro_batches):
    prompts = PROMPTS * 2
    changes = {"draft": "ngram", "draft_length": 2, "prefill_chunk": 4}
    got, stats = run(tiny(), plan("streaming", batch_size=rows, micro_batches=micro_batches, **changes), prompts)
    assert got == expected * 2
    assert stats["compilations_after_warmup"] == 0


def test_every_pass_brings_each_layer_once():
    engine = sm.Engine(tiny(), plan("streaming", batch_size=4))
    infos = []
    engine.generate(PROMPTS, GREEDY, on_step=infos.append)
    layer = TINY.num_experts * TINY.expert_params * 4
    # The first layer of the next pass is on its way through the drafting, but counts for the pass that sent for it.
    assert {info.link_bytes for info in infos} == {TINY.num_layers * layer}


def test_partly_right_drafts_are_exact_in_micro_batches(expected):
    texts = dict(zip(PROMPTS, expected, strict=True))
    draft = ScriptedDraft(3, texts, right=lambda row, start: (row + start) % 4)
    changes = {"draft": "custom", "draft_length": 3, "batch_size": 3, "micro_batches": 3}
    engine = sm.Engine(tiny(), plan("streaming", **changes), draft=draft)
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == expected
    assert engine.stats()["tokens_per_step"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches, rows", [(1, 8), (2, 8), (3, 3)])
def test_an_eagle_head_drafts_for_rows_that_come_and_go(expected, micro_batches, rows):
    changes = {"batch_size": rows, "micro_batches": micro_batches, "draft_length": 3, "prefill_chunk": 8}
    got, stats = run(tiny(), plan("specmoeoff", **changes), PROMPTS * 2, draft_head=eagle_head(tiny()))
    assert got == expected * 2
    assert stats["compilations_after_warmup"] == 0


def test_a_draft_model_keeps_up_with_rows_that_come_and_go(expected):
    changes = {"draft": "model", "draft_length": 3, "batch_size": 3}
    got, stats = run(tiny(), plan("streaming", **changes), draft_model=tiny())
    assert got == expected
    assert stats["tokens_per_step"] > 2.5  # the model drafts for itself


def test_the_guard_changes_the_draft_length_between_steps(expected):
    changes = {"draft": "ngram", "draft_length": 4, "guard": True, "batch_size": 3}
    engine = sm.Engine(tiny(), plan("streaming", **changes))
    drafted = []
    got = tokens_of(engine.generate(PROMPTS, GREEDY, on_step=lambda info: drafted.append(info.drafted)))
    assert got == expected
    assert len(set(drafted)) > 1
    assert engine.stats()["compilations_after_warmup"] == 0


def test_speed_is_told_with_and_without_the_tail():
    _, stats = run(tiny(), plan("streaming", batch_size=3))
    assert stats["full_batch_tokens_per_s"] > 0
    _, stats = run(tiny(), plan("streaming", batch_size=4), PROMPTS[:2])
    assert stats["full_batch_tokens_per_s"] > 0  # a job smaller than the batch is its own batch


def test_sampled_tokens_do_not_depend_on_the_flow():
    """Without a draft a sampled token is a function of the target's distribution and the row's key alone."""
    want, _ = run(tiny(), plan("resident", batch_size=8), params=SAMPLED)
    got, _ = run(tiny(), plan("streaming", batch_size=3, micro_batches=3), params=SAMPLED)
    assert got == want


@pytest.mark.slow
def test_greedy_and_sampled_requests_share_a_queue():
    params = [GREEDY if i % 2 else SAMPLED for i in range(len(PROMPTS))]
    want, _ = run(tiny(), plan("resident", batch_size=1), params=params)
    got, stats = run(tiny(), plan("streaming", batch_size=2), params=params)
    assert got == want
    assert stats["compilations_after_warmup"] == 0


def test_the_functional_face_takes_one_batch(expected):
    engine = sm.Engine(tiny(), plan("streaming", batch_size=8, micro_batches=2))
    state = engine.init(PROMPTS, GREEDY)
    assert state.active.all()
    while not state.done:
        state, _ = engine.step(state)
    assert list(state.generated) == expected


def test_little_host_memory_means_fewer_rows_at_a_time(expected):
    everything = plan("streaming", batch_size=8)
    experts = TINY.num_layers * TINY.num_experts * TINY.expert_params * 4
    page = KV_PAGE * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    engine = sm.Engine(tiny(), everything.replace(host_memory_bytes=experts + 4 * page))
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == expected
    with pytest.raises(sm.PlanError, match=r"longest context that fits|too small"):
        sm.Engine(tiny(), everything.replace(host_memory_bytes=experts + page // 2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kv_tier": "accelerator"}, "kv_tier=host"),
        ({"draft": "self", "draft_length": 2, "draft_experts": 2}, "keeps none"),
        ({"cached_experts": 2}, "no effect"),
        ({"retain": True}, "no effect"),
        ({"micro_batches": 9, "batch_size": 8}, "at most as many"),
        ({"layer_buffers": 4}, "streaming takes 2 to 3"),
        ({"layer_buffers": 1}, "streaming takes 2 to 3"),
        ({"layer_buffers": 3, "expert_flow": "on_demand"}, "no effect"),
        ({"micro_batches": 2, "expert_flow": "on_demand"}, "no effect"),
    ],
)
def test_what_streaming_cannot_do_is_refused(changes, words):
    with pytest.raises(sm.PlanError, match=words):
        plan("streaming").replace(**changes).validate(TINY)


@pytest.mark.parametrize("device_slots", [2 * TINY.num_experts - 1])
def test_streaming_needs_both_of_its_buffers(device_slots):
    engine = sm.Engine(tiny(), plan("streaming", batch_size=1))
    need = engine.stats()["peak_accelerator_bytes"]
    assert need is None or need > 0
    with pytest.raises(sm.PlanError, match="2 layers' experts"):
        sm.Engine(tiny(), plan("streaming", batch_size=1, device_memory_bytes=device_slots * TINY.expert_params * 4))


def _state(rows: int, num_pages: int, longest: int) -> State:
    kv = HostKV(caches=(), pages=no_pages(rows, longest, num_pages), chunk=4, staged=4)
    return State(
        requests=(None,) * rows,
        kv=kv,
        memory=None,
        lengths=np.zeros(rows, np.int32),
        last_token=np.zeros(rows, np.int32),
        generated=((),) * rows,
        statuses=(EMPTY,) * rows,
        rows=sampling_rows([GREEDY] * rows),
        adaptive_length=None,
    )


@hypothesis.given(st.data())
def test_every_interleaving_of_ends_and_refills_serves_each_request_once(data):
    """The scheduler alone: rows end in any order; pages are never shared, and what joins has its whole prompt in its chunks."""
    rows = data.draw(st.integers(1, 4))
    prompts = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=9))
    waiting = tuple(
        Request(id=i, prompt=None, token_ids=tuple(range(1, n + 1)), params=GREEDY, limit=16) for i, n in enumerate(prompts)
    )
    longest = max(prompts) + 16 + 3
    num_pages = data.draw(st.integers(pages_of(longest), rows * pages_of(longest)))
    state, served = _state(rows, num_pages, longest), []
    while waiting or not state.done:
        state, waiting = admit(state, waiting, lookahead=3)
        table = state.kv.pages.table
        used = table[table >= 0]
        assert len(set(used.tolist())) == len(used)
        assert state.kv.pages.free.sum() + len(used) == num_pages
        for row in np.flatnonzero(state.joining):
            request = state.requests[row]
            served.append(request.id)
            pieces = [(c.micro_batch, list(c.rows).index(row)) for c in prompt_chunks(state) if row in c.rows]
            taken = [int(t) for item, i in pieces for t in item.tokens[i, : item.num_new[i]]]
            assert tuple(taken) == request.token_ids[:-1]
            assert (table[row] >= 0).sum() == pages_of(len(request.token_ids) + 16 + 3)
        state = joined(state)
        running = np.flatnonzero(state.active)
        ending = data.draw(st.sets(st.sampled_from(running.tolist()), min_size=1))
        state = state._replace(statuses=tuple(finished("stop") if i in ending else s for i, s in enumerate(state.statuses)))
    assert served == sorted(served) == list(range(len(prompts)))
