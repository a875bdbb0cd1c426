"""EAGLE heads in the engine: no token changes, and every proposal is what the published network says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eagle_oracle import chain, eagle1, eagle3, rms
from engine_cases import GREEDY, PROMPTS, SAMPLED, ScriptedDraft, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.models import layers
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.model import _reference_layer
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.speculate.drafts.eagle import EagleDraft
from specmoe_jax.testing import TINY, eagle_head


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.fixture(scope="module")
def head(model):
    return eagle_head(model)


def drafting(preset="on_demand", length=4, **changes):
    return plan(preset, draft="eagle", draft_length=length, **changes)


CASES = {
    "on demand": {},
    "one token": {"length": 1},
    "six tokens": {"length": 6},
    "resident": {"preset": "resident"},
    "caching": {"preset": "caching"},
    "host cache": {"kv_tier": "host"},
    "host cache, resident": {"kv_tier": "host", "preset": "resident"},
    "guard": {"guard": True},
    "small chunks": {"prefill_chunk": 2, "batch_size": 3},
    "token by token": {"prefill_chunk": 1},
    "retain": {"retain": True},
}


@pytest.mark.parametrize("case", CASES)
def test_lossless(model, head, resident, case):
    tokens, stats = run(model, drafting(**CASES[case]), draft_head=head)
    assert tokens == resident
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["on demand", "host cache, resident"])
def test_lossless_with_features_of_three_layers(model, resident, case):
    tokens, stats = run(model, drafting(**CASES[case]), draft_head=eagle_head(model, fused=True))
    assert tokens == resident
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("case", ["on demand", "host cache"])
def test_deterministic_sampling_is_the_same_with_and_without(model, head, case):
    options = CASES[case]
    preset, changes = options.get("preset", "on_demand"), {k: v for k, v in options.items() if k != "preset"}
    plain = run(model, plan(preset, deterministic_sampling=True, **changes), params=SAMPLED)[0]
    drafted = run(model, drafting(preset, deterministic_sampling=True, **changes), params=SAMPLED, draft_head=head)[0]
    assert drafted == plain


def test_sampled_rows_run_and_repeat(model, head):
    """The law is acceptance's business (tests/speculate); here: true distributions are handed over, draws repeat."""
    first, stats = run(model, drafting(), params=SAMPLED, draft_head=head)
    assert run(model, drafting(), params=SAMPLED, draft_head=head)[0] == first
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_mates_or_on_the_request_before(model, head):
    """Ordinary sampling too: a head's proposals come from the row alone, so its draws do."""
    alone = [run(model, drafting(), [prompt], SAMPLED, draft_head=head)[0] for prompt in PROMPTS[:1]]
    engine = sm.Engine(model, drafting(batch_size=3), draft_head=head)
    together = tokens_of(engine.generate(PROMPTS, SAMPLED))
    assert together[:1] == alone[0]
    assert tokens_of(engine.generate(PROMPTS, SAMPLED)) == together


def target_features(model, head, ids):
    """Fused features [T, M] of a text from the cacheless reference, in float64."""
    padded = np.zeros((1, 64), np.int32)  # of one length, so that it compiles once
    padded[0, : len(ids)] = ids
    h, inputs = layers.embed(model.weights, jnp.asarray(padded)), []
    for layer in range(TINY.num_layers):
        inputs.append(h)
        blocks = [jax.device_put(block, jax.memory.Space.Device) for block in model.experts[layer]]
        h = _reference_layer(TINY.layers[layer], model.weights.layers[layer], blocks, h, None)
    if not head.config.fused:
        return np.asarray(layers.final_norm(TINY.head, model.weights, h)[0], np.float64)
    taken = np.concatenate([np.asarray(inputs[i][0], np.float64) for i in head.config.feature_layers], -1)
    return taken @ np.asarray(head.weights.fc, np.float64).T


def oracle_draft(model, head, text, length, *, after=(), want="tokens"):
    """Greedy tokens after a text; or the log-probabilities [V] after the drafted tokens `after`, along that branch."""
    names = [spec.name for spec in spec_leaves(eagle_config.weight_specs(head.config))]
    own = head.weights.replace(to_target=None)
    w = {name: np.asarray(leaf, np.float64) for name, leaf in zip(names, jax.tree.leaves(own), strict=True)}
    attention = head.config.layer.attention
    raw = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "rms_norm_eps": head.config.layer.norm_eps,
        "rope_theta": 1e4,
    }
    embed, output = np.asarray(head.embed, np.float64), np.asarray(head.output, np.float64)
    features = target_features(model, head, text)[: len(text) - 1]
    if head.config.fused:
        to_target, inner = np.asarray(head.weights.to_target), w["lm_head.weight"]

        def scores(h):
            out = np.full(len(embed), -np.inf)
            out[to_target] = inner @ rms(h, w["norm.weight"], raw["rms_norm_eps"])
            return out

    else:
        scores = lambda h: output @ h  # noqa: E731
    network = eagle3 if head.config.fused else eagle1
    following = iter((*after, None))
    seen = []

    def choose(h):
        seen.append(scores(h))
        return int(np.argmax(seen[-1])) if want == "tokens" else next(following)

    drafted = chain(lambda t, f: network(w, raw, embed, t, f), text, features, length + len(after), choose)
    return drafted if want == "tokens" else seen[-1] - np.log(np.exp(seen[-1] - seen[-1].max()).sum()) - seen[-1].max()


class Watched(EagleDraft):
    """Notes what the head proposes, then hands out a script's tokens, so that any number of them is accepted."""

    def propose(self, view):
        proposal, kv = super().propose(view)
        self.seen.append((view.history, view.active, np.asarray(proposal.tokens)))
        scripted, _ = self.script.propose(view)
        return proposal._replace(tokens=scripted.tokens), kv


@pytest.mark.parametrize("fused", [False, True], ids=["eagle1", "eagle3"])
def test_every_proposal_is_the_published_networks(model, resident, fused):
    """Whatever was accepted before: the head's cache is that of the committed text, with the target's features."""
    length, head = 3, eagle_head(model, fused=fused)
    draft = Watched(head)
    script = ScriptedDraft(length, dict(zip(PROMPTS, resident, strict=True)), lambda row, start: (row + start) % (length + 1))
    Watched.seen, Watched.script = [], script
    engine = sm.Engine(model, plan("on_demand", draft="custom", draft_length=length, prefill_chunk=4), draft=draft)
    state, accepted = engine.init(PROMPTS, GREEDY), set()
    while not state.done:
        state, info = engine.step(state)
        accepted |= set(info.accepted[info.active].tolist())
    assert list(state.generated) == resident
    assert accepted == set(range(length + 1))
    checked = 0
    for history, active, tokens in Watched.seen[1:]:  # the first was the warm-up's
        for row in np.flatnonzero(active):
            if len(history[row]) > 1:  # before that there is no feature to start from
                assert tokens[row].tolist() == oracle_draft(model, head, history[row], length)
                checked += 1
    assert checked > 30


def test_its_bytes_are_in_the_memory_account(model, head):
    _, alone = run(model, plan("on_demand", draft="ngram", draft_length=4), PROMPTS[:1])
    _, both = run(model, drafting(), PROMPTS[:1], draft_head=head)
    assert both["peak_accelerator_bytes"] - alone["peak_accelerator_bytes"] == eagle.head_bytes(head, batch_rows=1, positions=64)
    with pytest.raises(sm.PlanError, match="device memory"):
        budget = alone["peak_accelerator_bytes"] - (TINY.num_experts - 1) * model.expert_bytes
        sm.Engine(model, drafting(device_memory_bytes=budget), draft_head=head).generate(PROMPTS[:1])


def test_refused(model, head):
    with pytest.raises(sm.PlanError, match="draft_head"):
        sm.Engine(model, drafting())
    with pytest.raises(sm.PlanError, match="draft_head"):
        sm.Engine(model, plan(), draft_head=head)
    other = dataclasses.replace(model, weights=model.weights.replace(embed=model.weights.embed + 0))
    with pytest.raises(sm.PlanError, match="another model"):
        sm.Engine(other, drafting(), draft_head=head)
