"""The target's own layer for further tokens as a draft: no token changes in any flow, and every proposal is the layer's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import ScriptedTree, tokens_of
from test_trees import oracle_tree, path_of

from specmoe_jax import PRESETS, CheckpointError, Engine, PlanError, SamplingParams, load_mtp
from specmoe_jax.autotune.calibrate import calibrate
from specmoe_jax.engine.drafts.hot_mtp import swaps
from specmoe_jax.models import mtp
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.models.spec import DTYPE_BYTES
from specmoe_jax.planner.costs import cache_row
from specmoe_jax.planner.memory.account import account
from specmoe_jax.speculate.drafts.grown_tree import TreeShape
from specmoe_jax.speculate.drafts.mtp import MtpDraft
from specmoe_jax.testing import TINY
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family
from specmoe_jax.types import KVCache

FAMILIES = ("glm4_moe", "deepseek_v3")
PROMPTS = [(5,), (5, 99, 3, 17, 64, 8, 2, 120, 44, 9, 31), (77, 6, 30), (1, 2, 3, 4, 5)]
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=10, ignore_eos=True, temperature=0.9, seed=3)


def generated(model: Model, preset: str, params=GREEDY, prompts=PROMPTS, **changes):
    """Tokens of each prompt, and the figures."""
    plan = PRESETS[preset](model.config).replace(**{"batch_size": 4, "prefill_chunk": 4} | changes)
    given = {"mtp_head": mtp.random_head(model)} if plan.draft == "mtp" else {}
    engine = Engine(model, plan, **given)
    return tokens_of(engine.generate(prompts, params)), engine.stats()


TREE = {"draft_tree_top_k": 2, "draft_tree_tokens": 5}
CASES = {
    "on demand": {"preset": "on_demand"},
    "one token": {"preset": "on_demand", "draft_length": 1},
    "resident": {"preset": "resident"},
    "caching": {"preset": "caching"},
    "host cache": {"preset": "on_demand", "kv_tier": "host"},
    "guard": {"preset": "resident", "guard": True},
    "rows that change": {"preset": "on_demand", "batch_size": 3, "prefill_chunk": 2},
    "streaming": {"preset": "streaming", "micro_batches": 2},
    "tree": {"preset": "on_demand", **TREE},
    "tree, streaming": {"preset": "streaming", "batch_size": 3, "draft_tree_top_k": 3, "draft_tree_tokens": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(family, case):
    model = tiny_family(family)
    want, _ = generated(model, "resident")
    tokens, stats = generated(model, **{"draft": "mtp", "draft_length": 3} | CASES[case])
    assert tokens == want
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_sampling_is_the_same_with_and_without(family):
    model, changes = tiny_family(family), {"params": SAMPLED, "deterministic_sampling": True}
    want, _ = generated(model, "on_demand", **changes)
    for tree in ({}, TREE):
        assert generated(model, "on_demand", draft="mtp", draft_length=3, **changes, **tree)[0] == want


def test_sampled_rows_run_and_repeat():
    """True distributions are handed over, draws repeat."""
    runs = [generated(tiny_family("glm4_moe"), "on_demand", SAMPLED, draft="mtp", draft_length=3) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1]["compilations_after_warmup"] == 0


@pytest.mark.slow
def test_bfloat16_runs():
    model = tiny_family("deepseek_v3", "bfloat16")
    tokens, stats = generated(model, "on_demand", draft="mtp", draft_length=2, dtype="bfloat16")
    assert all(len(row) == GREEDY.max_new_tokens for row in tokens)
    assert stats["compilations_after_warmup"] == 0


SEVERAL = {
    "glm4_moe": {"num_nextn_predict_layers": 3},
    "mimo_v2_flash": {},
    "qwen3_5_moe": {},
}


@functools.cache
def other_model(family: str) -> Model:
    """With several layers for further tokens, with dense ones, or with one beside recurrent layers."""
    return random_model(parse_config(RAW_CONFIGS[family] | SEVERAL[family]))


@pytest.mark.parametrize("case", ["on demand", "rows that change", "streaming"])
@pytest.mark.parametrize("family", SEVERAL)
def test_several_layers_are_lossless(family, case):
    model = other_model(family)
    want, _ = generated(model, "resident")
    tokens, stats = generated(model, **{"draft": "mtp", "draft_length": 3} | CASES[case])
    assert tokens == want
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("family", ["glm4_moe", "mimo_v2_flash"])
def test_every_proposal_of_several_layers_is_their_own(family):
    """Whatever was accepted before: drafted again from nothing, each layer over all rows, as MtpModel of transformers goes."""
    model = other_model(family)
    head, length = mtp.random_head(model), 3
    Watched.seen = []
    plan = PRESETS["on_demand"](model.config).replace(draft="custom", draft_length=length, prefill_chunk=4, batch_size=4)
    Engine(model, plan, draft=Watched(head)).generate(PROMPTS, GREEDY)
    checked = 0
    for history, active, tokens in Watched.seen[1::2]:
        for row in np.flatnonzero(active):
            if len(history[row]) > length:
                assert tokens[row].tolist() == slow_proposal(head, model, history[row])
                checked += 1
    assert checked > 5


def slow_proposal(head, model: Model, text: tuple[int, ...]) -> list[int]:
    """One token of each layer: the k-th reads all rows, with the states of the layer before and the tokens k + 1 further on."""
    states, padded = last_states(model, text)
    known, tokens, found = len(text) - 1, np.roll(padded, -1, axis=1), []
    for layer in head.chain:
        attention = layer.config.attention
        cache = jnp.zeros((1, attention.num_kv_heads, 40, attention.cache_dim))
        kv, rows = KVCache(k=(cache,), v=(cache,)), jnp.zeros(1, jnp.int32)
        states, _ = FORWARD(layer, jnp.asarray(tokens), states, kv, rows, jnp.array([0]), jnp.array([known]))
        found.append(int(mtp.logits(layer, states[:, known - 1])[0].argmax()))
        tokens = np.roll(tokens, -1, axis=1)
        tokens[0, known - 1] = found[-1]
    return found


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_quantised_experts(family):
    """All of them on the accelerator in a quarter of the bytes; the text is the target's whatever is drafted."""
    model = tiny_family(family)
    plan = PRESETS["on_demand"](model.config).replace(
        draft="mtp", draft_length=3, batch_size=4, prefill_chunk=4, draft_expert_dtype="int8"
    )
    engine = Engine(model, plan, mtp_head=mtp.random_head(model, expert_dtype="int8"))
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == generated(model, "resident")[0]
    head = mtp.random_head(model, expert_dtype="int8")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((head.weights, head.experts)))
    assert mtp.head_bytes(model.config, "float32", "int8") == held < mtp.head_bytes(model.config, "float32")
    with pytest.raises(PlanError, match=r"draft_expert_dtype is int8, and the experts of the layer .* are packed as None"):
        Engine(model, plan, mtp_head=mtp.random_head(model))
    with pytest.raises(PlanError, match="draft_expert_dtype=int8 has no effect with draft=ngram"):
        plan.replace(draft="ngram").validate(model.config)
    with pytest.raises(PlanError, match="draft_expert_dtype has no effect: the layers for further tokens have no experts"):
        plan.validate(other_model("mimo_v2_flash").config)
    with pytest.raises(PlanError, match=r"draft_tree_top_k is 2; trees are grown by one layer .* this model has 3: leave out"):
        plan.replace(draft_expert_dtype=None, **TREE).validate(other_model("glm4_moe").config)
    with pytest.raises(PlanError, match=r"draft_length is 4; this model's 3 layers .* draft one each: give at most 3"):
        plan.replace(draft_length=4).validate(other_model("glm4_moe").config)


HOT = {"draft": "mtp", "draft_length": 3, "draft_experts": 4, "batch_size": 4, "prefill_chunk": 4}


@pytest.mark.parametrize("preset", ["on_demand", "streaming"])
def test_hot_experts(preset):
    """Some are on the accelerator, the most chosen ones of the prompts; no token changes, and their bytes are counted."""
    model = tiny_family("glm4_moe")
    head = mtp.random_head(model, experts_on_host=True)
    engine = Engine(model, PRESETS[preset](model.config).replace(**HOT), mtp_head=head)
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == generated(model, "resident")[0]
    assert engine.stats()["compilations_after_warmup"] == 0
    state = engine.init(PROMPTS, GREEDY)
    while not state.done:
        counts, was_due = np.asarray(state.draft_memory.own.counts[0]), state.draft_memory.due == 0
        state, info = engine.step(state)
        held = state.draft_memory.held[0]
        assert len(set(held.tolist())) == 4
        if was_due and info.drafted and counts.any():
            assert counts[held].min() >= np.delete(counts, held).max()
            seen = True
    assert seen


def test_hot_experts_are_the_layers_own():
    """Beside the whole layer, whose router may choose the same experts alone."""
    model = tiny_family("glm4_moe")
    whole, split = mtp.random_head(model), mtp.random_head(model, experts_on_host=True)
    held = np.array([5, 0, 2, 6])
    slots = np.full(7, -1, np.int32)
    slots[held] = np.arange(4)
    blocks = jnp.stack([jnp.asarray(np.asarray(split.experts[expert])) for expert in held])
    some = dataclasses.replace(split, experts=blocks, slots=jnp.asarray(slots))
    same = dataclasses.replace(whole, slots=jnp.where(slots < 0, -1, jnp.arange(7)))
    text = (5, 99, 3, 17, 64, 8, 2)
    found, wanted, full = (np.asarray(begin(one, model, text)[0]) for one in (some, same, whole))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - full).max() > 1e-3


def test_which_experts_are_brought():
    assert swaps(np.array([0.0, 5, 3, 3]), np.array([0, 3])) == [(0, 1)]  # 2 is chosen as often as 3, which is there
    assert swaps(np.array([9.0, 1, 8, 7]), np.array([-1, -1])) == [(0, 0), (1, 2)]
    assert swaps(np.array([9.0, 1, 8, 7]), np.array([2, 0])) == []


def test_hot_experts_in_the_account():
    model = tiny_family("glm4_moe")
    plan, config = PRESETS["on_demand"](model.config).replace(**HOT), model.config
    head, memory = mtp.random_head(model, experts_on_host=True), plan.drafting.memory(plan, config)
    assert memory.host == sum(block.nbytes for block in head.experts)
    assert memory.fixed == sum(leaf.nbytes for leaf in jax.tree.leaves(head.weights)) + memory.host * 4 // 7
    held = account(config, plan, batch_rows=2, positions=64, draft=memory)
    assert held.host_bytes == held.host_expert_bytes + held.hidden_bytes + memory.host
    with pytest.raises(PlanError, match=r"draft_experts is 4, and the experts .* are on the accelerator; load it so: .*=True"):
        Engine(model, plan, mtp_head=mtp.random_head(model))
    with pytest.raises(PlanError, match=r"draft_experts is None, and the experts .* are in host memory; load it so: .*=False"):
        Engine(model, plan.replace(draft_experts=None), mtp_head=head)
    with pytest.raises(PlanError, match="draft_experts is 2; draft=mtp takes one number, 3 to 6 of each layer's experts"):
        plan.replace(draft_experts=2).validate(config)
    with pytest.raises(PlanError, match="draft_experts has no effect: the layers for further tokens have no experts"):
        plan.validate(other_model("mimo_v2_flash").config)


def test_hot_experts_of_several_layers():
    model = other_model("glm4_moe")
    head = mtp.random_head(model, experts_on_host=True)
    engine = Engine(model, PRESETS["on_demand"](model.config).replace(**HOT), mtp_head=head)
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == generated(model, "resident")[0]


class Watched(MtpDraft):
    """Notes what is proposed after which history."""

    def propose(self, view):
        proposal, kv = super().propose(view)
        self.seen.append((view.history, view.active, np.asarray(proposal.tokens)))
        return proposal, kv


class WatchedTree(MtpDraft):
    """Notes the layer's tree, then hands out a script's, so that any path is accepted."""

    def propose(self, view):
        proposal, kv = MtpDraft.propose(self, view)
        self.seen.append((view.history, view.active, jax.device_get((proposal.tokens, proposal.tree))))
        scripted, _ = self.script.propose(view)
        return proposal._replace(tokens=scripted.tokens, tree=scripted.tree), kv


def test_every_tree_is_the_layers_own():
    """Nodes and parents against a layer that reads a whole text and then path by path, after steps that accepted any path."""
    model, depth = tiny_family("glm4_moe"), 3
    head, want = mtp.random_head(model), generated(model, "resident")[0]
    script = ScriptedTree(depth, 6, dict(zip(PROMPTS, want, strict=True)), lambda row, start: (row + start) % (depth + 1))
    WatchedTree.seen, WatchedTree.script = [], script
    fields = {"draft_length": depth, "draft_tree_top_k": 2, "draft_tree_tokens": 6, "prefill_chunk": 4, "batch_size": 4}
    plan, draft = PRESETS["on_demand"](model.config).replace(draft="custom", **fields), WatchedTree(head, TreeShape(2, 6))
    assert tokens_of(Engine(model, plan, draft=draft).generate(PROMPTS, GREEDY)) == want
    checked = 0
    for history, active, (tokens, tree) in WatchedTree.seen[1:4]:
        for row in np.flatnonzero(active):
            if len(history[row]) > 1:
                paths = {path_of(node, tokens[row], tree.parents[row]) for node in range(1, 7)}
                begun = begin(head, model, history[row])
                logp_after = functools.partial(own_logp, head, *begun)
                assert paths == oracle_tree(logp_after, depth, top_k=2, count=6)
                checked += 1
    assert checked > 6


def begin(head, model: Model, text: tuple[int, ...]):
    """(state [1, M] after a text, cache, rows in it), from the reference forward's states in one pass of the layer."""
    states, padded = last_states(model, text)
    attention, known = head.config.attention, len(text) - 1
    cache = jnp.zeros((1, attention.num_kv_heads, 40, attention.cache_dim))
    kv, rows = KVCache(k=(cache,), v=(cache,)), jnp.zeros(1, jnp.int32)
    states, kv = FORWARD(head, jnp.asarray(np.roll(padded, -1, axis=1)), states, kv, rows, jnp.array([0]), jnp.array([known]))
    return states[:, known - 1], kv, known


def own_logp(head, state: jax.Array, kv: KVCache, known: int, path: tuple[int, ...]) -> np.ndarray:
    """[V], after a path of drafted tokens."""
    for at, token in enumerate(path, known):
        given = (jnp.array([[token]]), state[:, None], kv, jnp.zeros(1, jnp.int32))
        states, kv = FORWARD(head, *given, jnp.array([at]), jnp.array([1]))
        state = states[:, 0]
    return np.asarray(jax.nn.log_softmax(mtp.logits(head, state)[0]))


def own_proposal(head, model: Model, text: tuple[int, ...], length: int) -> list[int]:
    """Tokens after a text, each the layer's own most likely one."""
    begun, found = begin(head, model, text), ()
    for _ in range(length):
        found += (int(own_logp(head, *begun, found).argmax()),)
    return list(found)


FORWARD = jax.jit(mtp.forward)


def last_states(model: Model, text: tuple[int, ...]):
    """[1, 32, M] after the final norm, and the text, padded."""
    plain = model.weights.replace(lm_head=jnp.eye(model.config.hidden_size))
    padded = np.zeros((1, 32), np.int32)  # of one length, so that it compiles once
    padded[0, : len(text)] = text
    return dataclasses.replace(model, weights=plain).logits(padded), padded  # against the identity


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_proposal_is_the_layers_own(family):
    """Whatever was accepted before: its cache is that of the committed text, with the target's states."""
    model = tiny_family(family)
    head, length = mtp.random_head(model), 3
    Watched.seen = []
    plan = PRESETS["on_demand"](model.config).replace(draft="custom", draft_length=length, prefill_chunk=4, batch_size=4)
    engine = Engine(model, plan, draft=Watched(head))
    engine.generate(PROMPTS, GREEDY)
    checked = 0
    for history, active, tokens in Watched.seen[1:]:  # the first was the warm-up's
        for row in np.flatnonzero(active):
            if len(history[row]) > 1:  # before that there is no state to start from
                assert tokens[row].tolist() == own_proposal(head, model, history[row], length)
                checked += 1
    assert checked > 20


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_its_bytes_are_in_the_memory_account(family):
    """Weights, all experts, its cache and its state; nothing of it crosses the link."""
    model = tiny_family(family)
    head = mtp.random_head(model)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((head.weights, head.experts)))
    assert mtp.head_bytes(model.config, "float32") == held
    _, alone = generated(model, "on_demand", prompts=PROMPTS[1:2], draft="ngram", draft_length=3)
    _, both = generated(model, "on_demand", prompts=PROMPTS[1:2], draft="mtp", draft_length=3)
    item = DTYPE_BYTES["float32"]
    more = held + item * (64 * cache_row(head.config.attention) + model.config.hidden_size)
    assert both["peak_accelerator_bytes"] - alone["peak_accelerator_bytes"] == more


def test_refused():
    model = tiny_family("glm4_moe")
    plan = PRESETS["on_demand"](model.config).replace(draft="mtp", draft_length=3)
    with pytest.raises(PlanError, match=r"layer for further tokens not given; draft=mtp and mtp_head=checkpoints\.load_mtp"):
        Engine(model, plan)
    with pytest.raises(PlanError, match="layer for further tokens given"):
        Engine(model, plan.replace(draft="ngram"), mtp_head=mtp.random_head(model))
    other = dataclasses.replace(model, weights=model.weights.replace(embed=model.weights.embed + 0))
    with pytest.raises(PlanError, match="of another model"):
        Engine(other, plan, mtp_head=mtp.random_head(model))
    with pytest.raises(PlanError, match="needs a model with a layer for further tokens, this one has 0"):
        plan.validate(TINY)
    with pytest.raises(PlanError, match="draft_tree_tokens is 20; a tree of depth draft_length=3 with 2 branches has 3 to 10"):
        plan.replace(draft_tree_top_k=2, draft_tree_tokens=20).validate(model.config)
    with pytest.raises(CheckpointError, match="not a checkpoint as it was loaded"):
        load_mtp(model)


@pytest.mark.slow
def test_a_calibration_measures_it():
    """Beside the others, each run given what its draft needs alone; the search then has it among its choices."""
    model = tiny_family("glm4_moe")
    found = calibrate(model, PROMPTS[1:3], SamplingParams(), mtp_head=mtp.random_head(model))
    assert 0 <= found.acceptance["mtp"].rate < 1
    plan = PRESETS["on_demand"](model.config).replace(draft="mtp", draft_length=2)
    assert found.acceptance_of(plan, model.config, found.skew) == found.acceptance["mtp"]
