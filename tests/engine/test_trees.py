"""Drafts that branch: no token changes, and caches, features and bytes are those of the accepted path."""

import functools

import jax
import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, ScriptedTree, plan, run, steps
from test_eagle import Watched, oracle_draft

import specmoe_jax as sm
from specmoe_jax.engine import Engine
from specmoe_jax.engine.figures import Totals, add_step
from specmoe_jax.speculate.drafts.eagle import EagleDraft
from specmoe_jax.speculate.drafts.grown_tree import TreeShape
from specmoe_jax.testing import TINY, eagle_head
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

DEPTH, COUNT = 4, 9


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


def tree_plan(preset="on_demand", draft="custom", depth=DEPTH, top_k=3, tokens=COUNT, **changes):
    return plan(preset, draft=draft, draft_length=depth, draft_tree_top_k=top_k, draft_tree_tokens=tokens, **changes)


def right(row, start):
    return (row + start) % (DEPTH + 1)


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
@pytest.mark.parametrize("preset", ["on_demand", "resident"])
def test_scripted_acceptance_anywhere_in_the_tree(model, resident, preset, kv_tier):
    """Each row accepts another path in each step; what later steps read of the cache is what that path left."""
    draft = ScriptedTree(DEPTH, COUNT, dict(zip(PROMPTS, resident, strict=True)), right)
    engine = Engine(model, tree_plan(preset, kv_tier=kv_tier), draft=draft)
    seen = set()
    for _, state, info in steps(engine):  # noqa: B007 (used after the loop)
        assert add_step(Totals(), info).verified_tokens == info.active.sum() * (COUNT + 1)  # every node, and the last token
        for row in np.flatnonzero(info.active):
            if GREEDY.max_new_tokens - info.start[row] > DEPTH:
                assert info.accepted[row] == right(row, len(PROMPTS[row]) + info.start[row])
                seen.add(int(info.accepted[row]))
        if preset == "on_demand":
            assert info.verify.routing.shape[2] == DEPTH + 1
    assert list(state.generated) == resident
    assert seen == set(range(DEPTH + 1))


@pytest.mark.parametrize("micro_batches, rows", [(1, 8), (2, 4)])
def test_scripted_acceptance_in_a_streamed_pass(model, resident, micro_batches, rows):
    """The same over pages in host memory, with rows that take each other's places."""
    draft = ScriptedTree(DEPTH, COUNT, dict(zip(PROMPTS, resident, strict=True)), right)
    a_plan = tree_plan("streaming", batch_size=rows, micro_batches=micro_batches)
    engine = Engine(model, a_plan, draft=draft)
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == resident
    assert engine.stats()["tokens_per_step"] > 2.5
    assert engine.stats()["compilations_after_warmup"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_an_eagle_tree_in_a_streamed_pass(model, params):
    changes = {"batch_size": 3, "draft_length": 3, "draft_tree_top_k": 2, "draft_tree_tokens": 5}
    a_plan = plan("streaming", draft="eagle", deterministic_sampling=True, **changes)
    want = run(model, plan("resident", deterministic_sampling=True), params=params)[0]
    assert run(model, a_plan, params=params, draft_head=eagle_head(model))[0] == want


@pytest.mark.slow
@pytest.mark.parametrize("family", RAW_CONFIGS)
def test_families(family):
    """Windows, chunks, sinks, latents: positions by depth and the ancestor mask in every attention."""
    model = tiny_family(family)
    vocab = model.config.vocab_size
    prompts = [tuple(int(t) % vocab for t in prompt) for prompt in PROMPTS[:4]]
    base = sm.PRESETS["resident"](model.config)
    want = [c.token_ids for c in Engine(model, base).generate(prompts, GREEDY)]
    a_plan = base.replace(draft="custom", draft_length=DEPTH, draft_tree_top_k=3, draft_tree_tokens=COUNT)
    draft = ScriptedTree(DEPTH, COUNT, dict(zip(prompts, want, strict=True)), right)
    engine = Engine(model, a_plan, draft=draft)
    assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == want
    assert engine.stats()["tokens_per_step"] > 1.5


@pytest.mark.slow
def test_an_encoder_decoder_embeds_positions_by_depth():
    """NLLB adds sinusoids to its embeddings, so a node's position counts before the first layer."""
    model = tiny_family("nllb_moe")
    base = sm.PRESETS["on_demand"](model.config).replace(batch_size=1)
    prompts = [tuple(t % 100 + 2 for t in prompt) for prompt in PROMPTS[2:5]]
    want = [c.token_ids for c in Engine(model, base).generate(prompts, GREEDY)]
    a_plan = base.replace(draft="custom", draft_length=DEPTH, draft_tree_top_k=3, draft_tree_tokens=COUNT)
    for prompt, text in zip(prompts, want, strict=True):
        draft = ScriptedTree(DEPTH, COUNT, {model.config.encoder.start: text}, lambda *_: DEPTH)
        engine = Engine(model, a_plan, draft=draft)
        assert engine.generate([prompt], GREEDY)[0].token_ids == text
        assert engine.stats()["tokens_per_step"] > 2.5


CASES = {
    "on demand": {},
    "resident": {"preset": "resident"},
    "host cache": {"kv_tier": "host"},
    "small batches": {"batch_size": 3, "prefill_chunk": 2},
    "one generation": {"depth": 1, "top_k": 5, "tokens": 5},
    "wide": {"depth": 3, "top_k": 8, "tokens": 40},
}


@pytest.mark.parametrize("case", CASES)
def test_eagle_trees_are_lossless(model, resident, case):
    tokens, stats = run(model, tree_plan(draft="eagle", **CASES[case]), draft_head=eagle_head(model))
    assert tokens == resident
    assert stats["compilations_after_warmup"] == stats["draft_link_bytes"] == 0


@pytest.mark.slow
def test_deterministic_sampling_is_the_same_with_and_without(model):
    plain = run(model, plan("on_demand", deterministic_sampling=True), params=SAMPLED)[0]
    a_plan = tree_plan(draft="eagle", deterministic_sampling=True)
    assert run(model, a_plan, params=SAMPLED, draft_head=eagle_head(model))[0] == plain
    draft = ScriptedTree(DEPTH, COUNT, dict(zip(PROMPTS, plain, strict=True)), right)
    tokens, stats = run(model, tree_plan(deterministic_sampling=True), params=SAMPLED, draft=draft)
    assert tokens == plain
    assert stats["tokens_per_step"] > 1.5


def test_sampled_rows_run_and_repeat(model):
    first = run(model, tree_plan(draft="eagle"), params=SAMPLED, draft_head=eagle_head(model))[0]
    assert run(model, tree_plan(draft="eagle"), params=SAMPLED, draft_head=eagle_head(model))[0] == first


class WatchedTree(Watched):
    """Notes the head's tree, then hands out a script's, so that any path is accepted."""

    def propose(self, view):
        proposal, kv = EagleDraft.propose(self, view)
        self.seen.append((view.history, view.active, jax.device_get((proposal.tokens, proposal.tree))))
        scripted, _ = self.script.propose(view)
        return proposal._replace(tokens=scripted.tokens, tree=scripted.tree), kv


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["eagle1", "eagle3"])
def test_every_tree_is_the_published_networks(model, resident, fused):
    """Nodes, parents and order of a tree against the cacheless oracle, after steps that accepted any path."""
    depth, head = 3, eagle_head(model, fused=fused)
    script = ScriptedTree(depth, 6, dict(zip(PROMPTS, resident, strict=True)), lambda row, start: (row + start) % (depth + 1))
    WatchedTree.seen, WatchedTree.script = [], script
    a_plan = tree_plan(depth=depth, top_k=2, tokens=6)
    engine = Engine(model, a_plan, draft=WatchedTree(head, TreeShape(top_k=2, tokens=6)))
    state = engine.init(PROMPTS, GREEDY)
    while not state.done:
        state, _ = engine.step(state)
    assert list(state.generated) == resident
    checked = 0
    for history, active, (tokens, tree) in WatchedTree.seen[1:4]:
        for row in np.flatnonzero(active):
            if len(history[row]) > 1:
                paths = {path_of(node, tokens[row], tree.parents[row]) for node in range(1, 7)}
                logp = functools.partial(oracle_draft, model, head, history[row], 1, want="logp")
                assert paths == oracle_tree(lambda path, logp=logp: logp(after=path), depth, top_k=2, count=6)
                checked += 1
    assert checked > 10


def path_of(node, tokens, parents):
    path = []
    while node:
        path.append(int(tokens[node - 1]))
        node = parents[node]
    return tuple(path[::-1])


def oracle_tree(logp_after, depth, *, top_k, count):
    """EAGLE-2 by its description: expand the best of each generation, keep the best of all. Paths as sets of tokens.

    logp_after: log-probabilities [V] of the token after a path.
    """
    scores, beam = {(): 0.0}, [()]
    for _ in range(depth):
        generation = []
        for path in beam:
            logp = logp_after(path)
            for token in np.argsort(-logp, kind="stable")[:top_k]:
                scores[(*path, int(token))] = scores[path] + logp[token]
                generation.append((*path, int(token)))
        beam = sorted(generation, key=lambda path: -scores[path])[:top_k]
    del scores[()]
    return set(sorted(scores, key=lambda path: -scores[path])[:count])


def test_a_tree_of_one_branch_is_the_chain(model, resident):
    head, texts = eagle_head(model), []
    for a_plan in (plan("on_demand", draft="eagle", draft_length=3), tree_plan(draft="eagle", depth=3, top_k=1, tokens=3)):
        engine = Engine(model, a_plan, draft_head=head)
        proposed = []
        state = engine.init(PROMPTS, GREEDY)
        draft = engine._resources.runtime.draft

        class Spy(EagleDraft):
            def propose(self, view, proposed=proposed):
                proposal, kv = super().propose(view)
                proposed.append(np.asarray(proposal.tokens)[view.active].tolist())
                return proposal, kv

        object.__setattr__(engine._resources.runtime, "draft", Spy(*draft))
        for _ in range(4):
            state, _ = engine.step(state)
        texts.append(proposed)
    assert texts[0] == texts[1]


REFUSED = [
    ({"draft_tree_tokens": None}, "give both"),
    ({"draft_tree_top_k": None}, "give both"),
    ({"draft_tree_tokens": 3}, "has 4 to 30 nodes"),
    ({"draft_tree_tokens": 31}, "has 4 to 30 nodes"),
    ({"draft_tree_top_k": 30}, "at most 21 branches"),
    ({"draft_tree_top_k": 0}, "whole number"),
    ({"guard": True}, "guard=True adapts the length of a chain"),
    ({"synthetic_acceptance": 0.5}, "synthetic_acceptance is for chains"),
    ({"draft": "ngram"}, "draft_tree_top_k=3 has no effect with draft=ngram"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_refused(changes, said):
    with pytest.raises(sm.PlanError, match=said):
        tree_plan(draft="eagle").replace(**changes).validate(TINY)


@pytest.mark.slow
def test_rows_for_growing_it_are_in_the_cache(model):
    """Wide trees at the end of the longest sequence still find room."""
    a_plan = tree_plan(draft="eagle", depth=5, top_k=12, tokens=12)
    assert a_plan.tree_rows == 48
    params = sm.SamplingParams(max_new_tokens=50, ignore_eos=True)
    want = run(model, plan("resident"), PROMPTS[:2], params)[0]
    assert run(model, a_plan, PROMPTS[:2], params, draft_head=eagle_head(model))[0] == want
