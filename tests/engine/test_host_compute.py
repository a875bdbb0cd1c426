"""Experts computed where they lie in host memory: the resident flow's tokens, no slots, and no byte over the link."""

import dataclasses

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, ScriptedDraft, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.loader import is_mapped
from specmoe_jax.engine.flows import host_compute
from specmoe_jax.models.model import random_model
from specmoe_jax.models.quantised import quantise
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY, eagle_head, tiny, write_tiny
from specmoe_jax.testing.families import tiny_family
from tests.packed_experts import packed_model

HERE = {"expert_flow": "host_compute"}
EAGLE = {"draft": "eagle", "draft_length": 3}
DRAFTS = {
    "none": {},
    "ngram": {"draft": "ngram", "draft_length": 3},
    "eagle": EAGLE,
    "tree": EAGLE | {"draft_tree_top_k": 2, "draft_tree_tokens": 5},
    "model": {"draft": "model", "draft_length": 2},
    "guard": {"draft": "ngram", "draft_length": 4, "guard": True},
}
needs_kernels = pytest.mark.skipif(not sm.ops.isas(), reason="needs the compiled kernels")
pytestmark = needs_kernels


def given(model, fields):
    head = {"draft_head": eagle_head(model)} if fields.get("draft") == "eagle" else {}
    return head | ({"draft_model": model} if fields.get("draft") == "model" else {})


@pytest.fixture(scope="module")
def resident(model):
    return {params: run(model, plan("resident"), params=params)[0] for params in (GREEDY, SAMPLED)}


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
@pytest.mark.parametrize("name", DRAFTS)
def test_no_draft_changes_a_token(model, resident, name, kv_tier):
    fields = DRAFTS[name] | HERE | {"kv_tier": kv_tier}
    tokens, stats = run(model, plan("resident", **fields), **given(model, fields))
    assert tokens == resident[GREEDY]
    assert stats["link_bytes"] == stats["prefill_link_bytes"] == 0
    assert stats["compilations_after_warmup"] == 0


def test_sampled_rows_and_chunks(model, resident):
    tokens, _ = run(model, plan("resident", prefill_chunk=4, **HERE), params=SAMPLED)
    assert tokens == resident[SAMPLED]


def test_a_custom_draft(model, resident):
    texts = dict(zip(PROMPTS, resident[GREEDY], strict=True))
    draft = ScriptedDraft(3, texts, right=lambda row, start: (row + start) % 4)
    tokens, stats = run(model, plan("resident", draft="custom", draft_length=3, **HERE), draft=draft)
    assert tokens == resident[GREEDY]
    assert 1 < stats["tokens_per_step"] < 4


@pytest.mark.parametrize("packing", ["bfloat16", "int8", "int4"])
def test_every_form_of_weights(packing):
    model = tiny("bfloat16") if packing == "bfloat16" else quantise(tiny(), packing)
    fields = {"dtype": "bfloat16"} if packing == "bfloat16" else {"expert_dtype": packing}
    expected, _ = run(model, plan("resident", **fields))
    assert run(model, plan("resident", **fields, **HERE))[0] == expected


@pytest.mark.parametrize("packing", ["fp8:128x128", "mxfp4", "awq:32", "compressed:32:bfloat16", "nvfp4", "lossless"])
def test_every_published_form_with_a_kernel(packing):
    sizes = dataclasses.replace(TINY, hidden_size=64, expert_hidden=32)  # whole groups of every format
    model, _ = packed_model(random_model(sizes), packing)
    expected, _ = run(model, plan("resident"))
    assert run(model, plan("resident", **HERE))[0] == expected


@pytest.mark.parametrize("packing", [None, "lossless", "mxfp4"])
def test_experts_that_do_not_fit_are_asked_for_together(monkeypatch, packing):
    """The same tokens; the kernels see odd addresses."""
    sizes = dataclasses.replace(TINY, hidden_size=64, expert_hidden=32)
    model = random_model(sizes) if packing is None else packed_model(random_model(sizes), packing)[0]
    expected, _ = run(model, plan("resident", **HERE))
    seen, addresses = [], host_compute.block_addresses
    monkeypatch.setattr(host_compute, "available_bytes", lambda: 1000)
    monkeypatch.setattr(host_compute, "anonymous_bytes", lambda: 1000)
    monkeypatch.setattr(host_compute, "block_addresses", lambda *a, **kw: seen.append(addresses(*a, **kw)) or seen[-1])
    assert run(model, plan("resident", **HERE))[0] == expected
    assert seen and all((table[:, 0] % 2 == 1).all() for table in seen)
    for name in ("available_bytes", "anonymous_bytes"):  # they fit; they are no pages of files
        with monkeypatch.context() as enough:
            enough.setattr(host_compute, name, lambda: 1 << 40)
            seen.clear()
            run(model, plan("resident", **HERE))
            assert seen and all((table[:, 0] % 2 == 0).all() for table in seen)


@pytest.mark.parametrize("packing", [None, "lossless"])
def test_experts_on_disk_are_computed_from_their_pages(tmp_path, packing):
    """Of a converted checkpoint; any other is refused."""
    dtype, on_disk = "bfloat16" if packing else "float32", {"expert_tier": "disk", "host_memory_bytes": 1 << 20}
    published, converted = tmp_path / "published", tmp_path / "converted"
    published.mkdir()
    write_tiny(published)
    convert(str(published), converted, to="specmoe", dtype=dtype, packing=packing)
    assert is_mapped(converted, dtype) and not is_mapped(published, dtype)
    here = plan("resident", dtype=dtype, **HERE).replace(**on_disk)
    tokens, stats = run(sm.load_model(converted, dtype=dtype, expert_tier="disk"), here)
    assert tokens == run(sm.load_model(published, dtype=dtype), plan("resident", dtype=dtype))[0]
    assert stats["dram_hits"] == stats["dram_misses"] == 0  # the system reads, and keeps what it can
    with pytest.raises(sm.PlanError, match="specmoe convert --format=specmoe lays them out so"):
        run(sm.load_model(published, dtype=dtype, expert_tier="disk"), here)


def test_packed_experts_with_biases_and_clamps():
    model, _ = packed_model(tiny_family("gpt_oss"), "mxfp4")
    prompts = [[5, 99, 3, 17, 64], [77, 6, 30]]
    resident, here = (
        tokens_of(sm.Engine(model, plan("resident", batch_size=2, **fields)).generate(prompts, GREEDY)) for fields in ({}, HERE)
    )
    assert here == resident


def test_experts_are_in_memory_once(model):
    whole = account(TINY, plan("resident"), batch_rows=4, positions=64)
    here = account(TINY, plan("resident", **HERE), batch_rows=4, positions=64)
    assert here.host_expert_bytes == whole.host_expert_bytes
    assert whole.accelerator_bytes - here.accelerator_bytes == whole.host_expert_bytes
    engine = sm.Engine(model, plan("resident", **HERE))
    engine.generate(PROMPTS[:2], GREEDY)
    assert engine._resources.runtime.experts.store.link.sent_bytes == 0


def test_what_is_read_is_the_models_own_memory(model):
    """The table holds the addresses of the blocks, in the order of the slots."""
    state = sm.Engine(model, plan("resident", **HERE)).init(PROMPTS[:1], GREEDY)
    addresses = np.asarray(state.memory.pool).view(np.uint64)[:, 0]
    blocks = [block for layer in model.experts for block in layer]
    assert addresses.tolist() == [block.unsafe_buffer_pointer() for block in blocks]


def test_what_it_cannot_compute_is_refused(model):
    with pytest.raises(sm.PlanError, match="no compiled kernel for the experts of gpt_oss; use expert_flow=resident"):
        family = tiny_family("gpt_oss")
        sm.Engine(family, sm.PRESETS["resident"](family.config).replace(**HERE))
    for field in ({"dram_policy": "lru"}, {"bypass_page_cache": True}):
        with pytest.raises(sm.PlanError, match=f"{next(iter(field))} has no effect with expert_flow=host_compute"):
            plan("resident", expert_tier="disk", host_memory_bytes=1 << 20, **HERE, **field).validate(TINY)
    with pytest.raises(sm.PlanError, match="machines whose accelerator is the CPU"):
        plan("resident", **HERE).resolved(accelerator_is_cpu=False)
    with pytest.raises(sm.PlanError, match="draft=self has no effect with expert_flow=host_compute"):
        plan(draft_length=2, draft_experts=2, **HERE).validate(TINY)


def test_without_kernels_it_is_refused(model, monkeypatch):
    from specmoe_jax.planner.flows import host_compute

    monkeypatch.setattr(host_compute, "isas", lambda: [])
    with pytest.raises(sm.PlanError, match="needs the compiled kernels"):
        sm.Engine(model, plan("resident", **HERE))


def test_two_pools_of_one_engine(model, resident):
    """Jobs of other shapes take tables of their own."""
    engine = sm.Engine(model, plan("resident", **HERE))
    for count in (1, 8, 2):
        done = engine.generate(PROMPTS[:count], dataclasses.replace(GREEDY))
        assert [completion.token_ids for completion in done] == resident[GREEDY][:count]
