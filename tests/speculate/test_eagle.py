"""The head's protocol: any rows of the batch in any order, chunk by chunk, a row serving one request after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eagle_oracle import eagle3, rms
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.speculate.drafts.eagle import EagleDraft
from specmoe_jax.speculate.drafts.ngram import NgramDraft
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.testing import EAGLE3_JSON, TINY, eagle_head, tiny

FLAGS = ("norm_before_residual", "norm_before_fc", "norm_output")
B, S, T = 4, 24, 3
LONGEST = 9


def draft(fused=False):
    return EagleDraft(eagle_head(tiny(), fused=fused))


def text(seed, count, head):
    """Features [count, M'] and the tokens after them [count]."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, head.config.feature_size), np.float32)
    return features, rng.integers(0, TINY.vocab_size, count).astype(np.int32)


def observe(a_draft, memory, pieces):
    """pieces: (row, features, following, first) of up to T positions each; the call is filled up to B pieces with padding."""
    rows, lengths, num_new = np.full(B, -1, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
    features = np.full((B, T, a_draft.head.config.feature_size), 7.0, np.float32)
    following = np.ones((B, T), np.int32)
    for i, (row, feature, token, first) in enumerate(pieces):
        rows[i], lengths[i], num_new[i] = row, first, len(token)
        features[i, : len(token)], following[i, : len(token)] = feature, token
    return a_draft.observe(memory, rows, following, features, lengths, num_new)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans())
def test_rows_in_any_order_and_pieces(data, fused):
    """Every row ends as if it alone had been observed in one piece, whatever was in it before."""
    a_draft = draft(fused)
    memory = a_draft.new_memory(B, S)
    wanted, queues = {}, []
    for row in range(B):
        queue = []
        for request in range(data.draw(st.integers(1, 2))):  # the second overwrites the first
            features, following = text([row, request], data.draw(st.integers(1, LONGEST)), a_draft.head)
            first = 0
            while first < len(following):
                count = data.draw(st.integers(1, T))
                queue.append((row, features[first : first + count], following[first : first + count], first))
                first += count
            wanted[row] = features, following
        queues.append(queue)
    while any(queues):
        waiting = [queue for queue in queues if queue]
        chosen = data.draw(st.permutations(range(len(waiting))))[: data.draw(st.integers(1, len(waiting)))]
        memory = observe(a_draft, memory, [waiting[i].pop(0) for i in chosen])
    for row, (features, following) in wanted.items():
        last, cache = whole(a_draft.head, features, following)
        np.testing.assert_allclose(memory.feature[row], last, atol=2e-5)
        for got, want in zip((memory.kv.k[0], memory.kv.v[0]), cache, strict=True):
            np.testing.assert_allclose(got[row][:, : len(following)], want[:, : len(following)], atol=2e-5)


@jax.jit
def _forward(head, cache, following, features, num_new):
    row = jnp.zeros(1, jnp.int32)
    return eagle.forward(head, following, eagle.fuse(head, features), cache, row, row, num_new)


def whole(head, features, following):
    """The last output and the cache of a text observed at once."""
    count, pad = len(following), LONGEST - len(following)
    padded = np.pad(following, (0, pad))[None], np.pad(features, ((0, pad), (0, 0)))[None]
    out, kv = _forward(head, EagleDraft(head).new_memory(1, S).kv, *padded, np.array([count], np.int32))
    return np.asarray(out[0, count - 1]), (np.asarray(kv.k[0][0]), np.asarray(kv.v[0][0]))


def test_a_row_without_anything_new_keeps_its_feature():
    a_draft = draft()
    memory = observe(a_draft, a_draft.new_memory(B, S), [(2, *text(0, 3, a_draft.head), 0)])
    before = np.asarray(memory.feature)
    memory = observe(a_draft, memory, [(2, np.zeros((0, TINY.hidden_size)), np.zeros(0, np.int32), 3)])
    np.testing.assert_array_equal(memory.feature, before)
    assert not before[[0, 1, 3]].any() and before[2].any()


def test_only_drafts_with_the_hooks_are_fed():
    assert isinstance(draft(), FeatureDraft)
    assert not isinstance(NgramDraft(), FeatureDraft) and not isinstance(SelfDraft(), FeatureDraft)


def test_a_reduced_vocabulary_proposes_its_own_tokens_only():
    head = eagle_head(tiny(), fused=True)
    scores = np.asarray(eagle.logits(head, jnp.ones((1, TINY.hidden_size))))[0]
    assert np.isfinite(scores).sum() == head.config.draft_vocab_size == 131
    assert np.flatnonzero(np.isfinite(scores)).tolist() == np.asarray(head.weights.to_target).tolist()


@pytest.mark.parametrize("flags", [(), ("norm_before_residual",), ("norm_before_fc",), ("norm_output",), FLAGS], ids="+".join)
def test_norms_of_the_speculators_library(flags):
    """The network in numpy with each of its options."""
    raw = EAGLE3_JSON | dict.fromkeys(flags, True)
    head = eagle.random_head(eagle_config.parse_config(raw, TINY, fused=True), tiny(), seed=3)
    weights = jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim == 1 else leaf, head.weights.replace(to_target=None))
    head = head.replace(weights=weights.replace(to_target=head.weights.to_target))
    specs = spec_leaves(eagle_config.weight_specs(head.config))
    named = {spec.name: np.asarray(leaf, np.float64) for spec, leaf in zip(specs, jax.tree.leaves(weights), strict=True)}
    features, following = text(5, LONGEST, head)
    last, _ = whole(head, features, following)
    inputs = rms(features, named["input_norm.weight"], raw["rms_norm_eps"]) if "norm_before_fc" in flags else features
    wanted = eagle3(named, raw, np.asarray(head.embed, np.float64), following, inputs @ named["fc.weight"].T)[-1]
    np.testing.assert_allclose(last, wanted, atol=2e-5)
    normed = wanted if "norm_output" in flags else rms(wanted, named["norm.weight"], raw["rms_norm_eps"])
    own = np.asarray(eagle.logits(head, jnp.asarray(last)[None]))[0]
    np.testing.assert_allclose(own[np.isfinite(own)], normed @ named["lm_head.weight"].T, atol=2e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_bytes_are_those_of_the_arrays(fused):
    a_draft = draft(fused)
    memory, head = a_draft.new_memory(B, S), a_draft.head
    own = sum(leaf.nbytes for leaf in jax.tree.leaves((head.weights, memory)))
    assert eagle.head_bytes(head, batch_rows=B, positions=S) == own
