"""Scores are those of the reference forward in every flow; under streaming a layer crosses the link once for all texts."""

import dataclasses

import numpy as np
import pytest
from engine_cases import GREEDY, plan, reference, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.engine.scoring.layout import ReadRow
from specmoe_jax.engine.scoring.logprobs import LOGITS_AT_ONCE, MOST_POSITIONS, positions_at_once
from specmoe_jax.engine.scoring.prefixes import batches, share_prefixes
from specmoe_jax.engine.scoring.rolling import rolling_windows
from specmoe_jax.engine.scoring.texts import encode_pair
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.models.model import random_model
from specmoe_jax.testing import EOS_ID, TINY, byte_tokenizer
from specmoe_jax.testing.families import tiny_family

RNG = np.random.default_rng(3)
TOLERANCE = 2e-5


def ids(count):
    return tuple(RNG.integers(0, 256, count).tolist())


SHARED, BEGIN = ids(7), ids(3)
PAIRS = [
    (ids(5), ids(4)),
    (SHARED, BEGIN),
    (SHARED, (*BEGIN, *ids(2))),  # goes on where another ends
    (SHARED, ids(1)),
    (SHARED, BEGIN),  # the same again
    (SHARED, ids(70)),  # longer than a tree
    (ids(1), ids(30)),
    (ids(40), ids(1)),
    *((SHARED, ids(9)) for _ in range(10)),  # more than one tree holds
]
CASES = {
    "resident": ("resident", {}),
    "resident, one row at a time": ("resident", {"batch_size": 1, "prefill_chunk": 4}),
    "on_demand, host cache": ("on_demand", {"kv_tier": "host", "batch_size": 3}),
    "specmoe": ("specmoe", {"batch_size": 4}),
    "streaming": ("streaming", {"batch_size": 2}),
    "streaming, prompts on the accelerator": (
        "streaming",
        {"batch_size": 2, "prefill_attention": "accelerator", "prefill_chunk": 16},
    ),
}


@pytest.fixture(scope="module")
def expected(model):
    return [reference(model, *pair) for pair in PAIRS]


def assert_scores(scores, expected):
    for score, (logprobs, greedy) in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.logprobs, logprobs, atol=TOLERANCE, rtol=0)
        assert score.is_greedy == greedy
        assert score.sum == pytest.approx(float(logprobs.sum()), abs=1e-3)


@pytest.mark.every_case
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scores_are_those_of_the_reference(model, expected, case):
    preset, changes = case
    engine = sm.Engine(model, plan(preset, **changes))
    assert_scores(engine.score(PAIRS), expected)


def test_greedy_text_is_greedy(model):
    """The engine's own answer, and the same with another last token."""
    engine = sm.Engine(model, plan("resident"))
    prompt = ids(6)
    (answer,) = tokens_of(engine.generate([prompt], GREEDY))
    first, second = engine.score([(prompt, answer), (prompt, (*answer[:-1], (answer[-1] + 1) % 256))])
    assert first.is_greedy and not second.is_greedy
    assert first.logprobs[:-1] == second.logprobs[:-1]  # nodes that both share


def test_scoring_and_generating_in_turn(model):
    """Pools and caches of one are no harm to the other."""
    engine, prompts = sm.Engine(model, plan("specmoe", batch_size=2)), [ids(6), ids(9)]
    before = tokens_of(engine.generate(prompts, GREEDY))
    scores = engine.score(PAIRS[:3])
    assert tokens_of(engine.generate(prompts, GREEDY)) == before
    assert engine.score(PAIRS[:3]) == scores


def test_contexts_are_read_once_and_layers_cross_once(model):
    engine = sm.Engine(model, plan("streaming", batch_size=2))
    engine.score(PAIRS)
    stats = engine.stats()
    assert stats["scored_tokens"] == sum(len(continuation) for _, continuation in PAIRS)
    assert stats["score_read_tokens"] < sum(len(context) + len(continuation) for context, continuation in PAIRS) - 10 * len(SHARED)
    layers = TINY.num_moe_layers + 1  # each once, and the first of the next pass
    # Two blocks of other bytes warm the copies up.
    assert layers <= stats["score_link_bytes"] / (TINY.num_experts * model.expert_bytes) < layers + 1


def test_common_beginnings_are_read_once():
    """Examples before every question, of two tasks: shared by whole pages, beside texts that share nothing."""
    model = random_model(dataclasses.replace(TINY, max_positions=240), seed=0)
    tasks = [ids(140), ids(100)]
    contexts = [(*tasks[i % 2], *ids(5 + i)) for i in range(6)]
    pairs = [(context, ids(1 + i)) for context in contexts for i in range(2)] + [(tasks[0][:129], ids(3)), (ids(70), ids(2))]
    alone = sm.Engine(model, plan("resident", batch_size=5))
    expected = alone.score(pairs)
    read = {}
    for pages in (None, 4):
        budget = None if pages is None else TINY.num_experts * TINY.num_moe_layers * model.expert_bytes + pages * 64 * 2_000
        engine = sm.Engine(model, plan("streaming", batch_size=2, host_memory_bytes=budget))
        for own, other in zip(engine.score(pairs), expected, strict=True):
            np.testing.assert_allclose(own.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)
        read[pages] = engine.stats()["score_read_tokens"]
    saved = 128 * 3 + 64 * 2  # of four and three rows
    assert read[None] == read[4] == alone.stats()["score_read_tokens"] - saved


@given(seed=st.integers(0, 1 << 30), num_pages=st.integers(6, 40))
@settings(deadline=None, max_examples=60)
def test_pages_of_rows_that_share_beginnings(seed, num_pages):
    """Every row has its pages in every batch that it is in, and only what it does not write is shared."""
    rng = np.random.default_rng(seed)
    begins = [tuple(rng.integers(0, 3, rng.integers(0, 200)).tolist()) for _ in range(3)]
    chains = [(*begins[rng.integers(3)], *rng.integers(0, 3, rng.integers(1, 90)).tolist()) for _ in range(12)]
    rows = share_prefixes([ReadRow(chain) for chain in chains], [len(chain) - 1 for chain in chains])
    seen = []
    for heads, batch, pages in batches(rows, 320, num_pages):
        seen += batch
        written = []
        for number in (*heads, *batch):
            row, own = rows[number], pages[number][pages[number] >= 0].tolist()
            begun = row.shared // KV_PAGE
            assert len(own) == -(-len(row.chain) // KV_PAGE) and max(own) < num_pages
            written += own[begun:]
            if row.prefix is not None:
                assert row.prefix in heads and own[:begun] == pages[row.prefix][:begun].tolist()
                assert rows[row.prefix].chain == row.chain[: row.shared] and row.shared < len(row.chain)
        assert len(set(written)) == len(written)
    assert sorted(seen) == list(range(12))


def test_a_small_cache_takes_more_passes(model, expected):
    """Host memory for one page or two: the same scores, and each layer crosses for every pass."""
    base = plan("streaming", batch_size=2)
    roomy = sm.Engine(model, base)
    roomy.score(PAIRS)
    experts = TINY.num_experts * TINY.num_moe_layers * model.expert_bytes
    engine = sm.Engine(model, base.replace(host_memory_bytes=experts + 150_000))
    assert_scores(engine.score(PAIRS), expected)
    assert engine.stats()["score_link_bytes"] > 2 * roomy.stats()["score_link_bytes"]


def test_no_call_of_the_head_is_large():
    for vocab in (263, 32_000, 151_936, 262_144):
        assert positions_at_once(vocab) <= MOST_POSITIONS
        assert positions_at_once(vocab) * vocab <= LOGITS_AT_ONCE


@pytest.mark.slow
def test_an_encoder_reads_the_context():
    model = tiny_family("nllb_moe")
    pairs = [((5, 99, 3, 17, 64), (8, 20, 44)), ((77, 6), (9, 31, 3, 5, 12)), ((4,), (7,))]
    engine = sm.Engine(model, sm.PRESETS["on_demand"](model.config).replace(batch_size=2, prefill_chunk=4))
    expected = [reference(model, model.config.encoder.start, answer, source) for source, answer in pairs]
    assert_scores(engine.score(pairs), expected)
    with pytest.raises(sm.RequestError, match="encoder-decoder scores a text given another"):
        engine.score_rolling([(5, 6)])


def test_rolling_windows_score_each_token_once_with_the_longest_context():
    text = list(range(1, 24))
    for window in (1, 3, 7, 30):
        for overlap in range(window):
            windows = list(rolling_windows(text, 0, window, overlap))
            assert [token for _, scored in windows for token in scored] == text
            for context, scored in windows:
                read = [*context, *scored][:-1]
                assert 1 <= len(read) <= window
                assert (*context, *scored) == tuple(range(scored[-1] - len(context) - len(scored) + 1, scored[-1] + 1))
            assert all(len(context) > overlap for context, _ in windows[1:])


def test_rolling_scores_begin_with_a_prefix(model):
    engine, text = sm.Engine(model, plan("resident")), ids(30)
    (whole,) = engine.score_rolling([text])
    assert_scores([whole], [reference(model, (EOS_ID,), text)])
    cut, other = engine.score_rolling([text, text[:4]], prefix=5, window=12, overlap=4)
    assert cut.token_ids == text and other.token_ids == text[:4]
    np.testing.assert_allclose(cut.logprobs[:12], reference(model, (5,), text[:12])[0], atol=TOLERANCE)
    np.testing.assert_allclose(cut.logprobs[12:20], reference(model, text[7:12], text[12:20])[0], atol=TOLERANCE)


def test_texts_are_encoded_as_one(model):
    engine = sm.Engine(model, plan("resident"))
    (of_text,) = engine.score([("The ", "sea")])
    (of_ids,) = engine.score([(list(b"The"), list(b" sea"))])
    assert of_text.token_ids == tuple(byte_tokenizer().encode(" sea"))
    assert len(of_ids.token_ids) == len(of_text.token_ids)
    assert encode_pair(byte_tokenizer().encode, "a  ", "b")[1] == byte_tokenizer().encode("  b")


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs is empty"),
        ([((1, 2), ())], "pair 0 has an empty continuation"),
        ([((1,), (2,)), ((), (2,))], "pair 1 has an empty context"),
        ([((1, 2), (TINY.vocab_size,))], "outside 0..262"),
        ([("text", (1, 2))], "give two texts, or two lists"),
        ([((1.5,), (2,))], "neither texts nor lists of token ids"),
        ([((1,) * 60, (2,) * 32)], "91 tokens to read and the model's window is 90"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, pairs, message):
    with pytest.raises(sm.RequestError, match=message):
        sm.Engine(model, plan("resident")).score(pairs)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts is empty"),
        (["a", ""], {}, "text 1 is empty"),
        (["a"], {"window": 91}, "window is 91"),
        (["a"], {"window": 4, "overlap": 4}, "overlap is 4 and window 4"),
    ],
)
def test_what_cannot_be_rolled_over_is_refused(model, texts, options, message):
    with pytest.raises(sm.RequestError, match=message):
        sm.Engine(model, plan("resident")).score_rolling(texts, **options)
