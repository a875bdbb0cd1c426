"""The trainer of the fine-grained MoE: its mathematics against slow twins and transformers, its runs on disk, its figures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specmoe_jax.support.errors import UserError
from specmoe_jax.training.witness import (
    attention,
    corpus,
    cross_entropy,
    dispatch,
    evaluate,
    export,
    loop,
    model,
    pairs,
    repetition,
    rollouts,
    run,
    samples,
    texts,
)
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig

TINY = WitnessConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=3,
    expert_hidden=8,
    dense_hidden=24,
    max_positions=128,
)
# AdamW, because Muon takes four times as long to compile.
RECIPE = RecipeConfig(batch_size=4, length=16, optimizer="adamw", warmup_steps=2, stable_steps=4, learning_rate=1e-2)


logits = jax.jit(model.logits, static_argnums=3)
mtp_states = jax.jit(model.mtp_states, static_argnums=4)


def normal(seed, *shape):
    """Drawn by NumPy: each shape that JAX draws is a compilation."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gradients(function, *arguments):
    """Of the sum of sines of what it returns, as leaves."""
    summed = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=tuple(range(len(arguments))))
    return jax.tree.leaves(jax.jit(summed)(*arguments))


@pytest.fixture(scope="module")
def weights():
    params = model.init_params(0, TINY)
    # Norms of one and biases of zero would hide an error in either.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: jnp.asarray(w * rng.uniform(0.5, 1.5, w.shape), jnp.float32), params)
    return params, 0.1 * normal(1, *model.init_bias(TINY).shape)


def random_tokens(*shape):
    return jnp.asarray(np.random.default_rng(2).integers(0, TINY.vocab_size, shape), jnp.int32)


def test_seats_hold_each_choice_once_and_drop_what_exceeds_the_capacity():
    ids = jnp.array([[0, 1], [0, 2], [0, 1]])
    seats = dispatch.seat(ids, 3, 2)
    np.testing.assert_array_equal(seats.slots, [[0, 2], [1, 4], [6, 3]])  # the third choice of expert 0 has no seat
    np.testing.assert_array_equal(seats.tokens, [0, 1, 0, 2, 1, 3])
    np.testing.assert_array_equal(seats.choices, [0, 2, 1, 5, 3, 6])


def test_dispatched_experts_and_their_gradients_equal_every_expert_on_every_row():
    params = model.init_params(3, TINY)
    experts, x = params.layers[1].ffn, normal(4, 24, TINY.hidden_size)

    def fast(x, experts):
        ids, chosen = model.route(jax.nn.sigmoid(x @ experts.router), jnp.zeros(TINY.num_experts), TINY)
        return model.routed_ffn(x, ids, chosen, experts.routed, 24)[0]

    def slow(x, experts):
        ids, chosen = model.route(jax.nn.sigmoid(x @ experts.router), jnp.zeros(TINY.num_experts), TINY)
        return model.every_expert(x, ids, chosen, experts.routed)

    for one, other in zip(gradients(fast, x, experts), gradients(slow, x, experts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_bias_changes_the_choice_but_not_the_weights():
    all_scores = jax.nn.sigmoid(normal(6, 5, 8))
    ids, chosen = model.route(all_scores, jnp.zeros(8).at[7].set(10.0), TINY)
    assert (ids == 7).any(axis=1).all()
    scores = jnp.take_along_axis(all_scores, ids, axis=1)
    np.testing.assert_allclose(chosen, 2.0 * scores / scores.sum(axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(loop.balanced(jnp.zeros((1, 3)), jnp.array([[1.0, 2.0, 3.0]]), 0.5), [[0.5, 0.0, -0.5]])


def test_the_blockwise_loss_and_its_gradients_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 8)
    hidden, head = normal(7, 32, 16), normal(8, 16, 50)
    targets = jnp.arange(32) % 50
    plain = lambda hidden, head: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets))  # noqa: E731
    blockwise = lambda hidden, head: cross_entropy.mean_nats(hidden, head, targets)  # noqa: E731
    got, wanted = (jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head)) for f in (blockwise, plain))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_attention_and_its_gradients_equal_softmax_over_the_whole_square(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)  # does not divide the length
    q, k, v = normal(2, 2, 12, 2, 3, 8), normal(3, 2, 12, 2, 8), normal(4, 2, 12, 2, 8)

    def plain(q, k, v):
        logits = jnp.einsum("btkgd,bskd->bkgts", q, k)
        shares = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((12, 12), bool)), logits, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bskd->btkgd", shares, v)

    for one, other in zip(gradients(attention.causal, q, k, v), gradients(plain, q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_position_sees_a_later_token(weights):
    tokens = random_tokens(2, 40)
    changed = tokens.at[:, 12].add(1) % TINY.vocab_size
    before, after = (logits(*weights, t, TINY) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert not np.allclose(before[:, 12:], after[:, 12:])


def write_tokenizer(path):
    tokenizer = corpus.train_tokenizer(["a tiny text, a tiny test"] * 3, TINY.vocab_size)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def theirs(weights, tmp_path):
    """The export as transformers reads it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export.write_checkpoint(tmp_path, *weights, TINY, tokenizer=write_tokenizer(tmp_path / "t.json"), dtype="float32")
    found, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return found


@pytest.mark.slow
def test_transformers_computes_the_same_logits(weights, theirs):
    import torch

    assert type(theirs).__name__ == "Glm4MoeForCausalLM"
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        wanted = theirs(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(logits(*weights, tokens, TINY), wanted, atol=1e-4)


def test_transformers_finds_the_mtp_layer_under_its_published_names_and_drafts_the_same(weights, theirs, monkeypatch):
    import torch

    layers, caches = pytest.importorskip("transformers.modeling_layers"), pytest.importorskip("transformers.cache_utils")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    # It knows the depths of the published models alone, 46 and 92.
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{TINY.num_layers}\."])
    mtp = layers.MtpModel.from_pretrained(theirs, device_map={"": "cpu"}).eval()
    tokens = random_tokens(2, 40)
    ids, positions = torch.tensor(np.asarray(tokens)), torch.arange(1, 40)[None]
    cache = caches.MtpCache(config=theirs.config.get_mtp_config())
    with torch.no_grad():
        hidden = theirs.model(ids).last_hidden_state[:, :-1]
        wanted = mtp(ids[:, 1:], hidden, attention_mask=None, position_ids=positions, mtp_cache=cache)[1][:, 0].numpy()
    params, bias = weights
    states = mtp_states(params, bias, jnp.asarray(hidden.numpy()), tokens[:, 1:], TINY)[0]
    np.testing.assert_allclose(states[:, -1] @ params.head, wanted, atol=1e-4)


def test_what_was_exported_is_read_back(weights, tmp_path):
    export.write_checkpoint(tmp_path, *weights, TINY, tokenizer=write_tokenizer(tmp_path / "t.json"), dtype="float32")
    assert export.read_config(tmp_path) == TINY
    for got, wanted in zip(jax.tree.leaves(export.read_checkpoint(tmp_path, TINY)), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(got, wanted)


def tiny_texts():
    rng = np.random.default_rng(0)
    return run.Texts(
        train=rng.integers(0, TINY.vocab_size, 2000).astype(np.uint16),
        held_out={"a": rng.integers(0, TINY.vocab_size, 100).astype(np.uint16)},
        sizes=np.full(TINY.vocab_size, 2),
        word_starts=np.arange(TINY.vocab_size) % 2 == 0,
    )


QUIET = run.Rhythm(evaluate_every=2, progress="none")


def equal_states(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_in_two_parts_equals_one_in_one_part_and_can_then_decay(tmp_path):
    # The parts meet between two draws of continuations, so those of the first part must have been kept.
    recipe = dataclasses.replace(RECIPE, repeat_weight=1.0, repeat_rows=2, repeat_every=3, repeat_prompt=4, repeat_tokens=8)
    run.train(TINY, recipe, tmp_path / "parts", tiny_texts(), dataclasses.replace(QUIET, stop_after_s=0.0))
    assert run.newest_step(tmp_path / "parts/stable") == 1
    parts = run.train(TINY, recipe, tmp_path / "parts", tiny_texts(), QUIET)
    equal_states(parts, run.train(TINY, recipe, tmp_path / "whole", tiny_texts(), QUIET))
    decayed = run.train(TINY, dataclasses.replace(recipe, decay_steps=2), tmp_path / "parts", tiny_texts(), QUIET)
    assert int(decayed.step) == 6 and run.newest_step(tmp_path / "parts/stable") == 4
    assert run.newest_step(tmp_path / "parts/decay-4-2") == 6
    lines = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4, 6]


def test_a_run_starts_from_exported_weights_and_refuses_another_beginning_later(weights, tmp_path):
    export.write_checkpoint(tmp_path / "a", *weights, TINY, tokenizer=write_tokenizer(tmp_path / "t.json"), dtype="float32")
    equal_states(run.first_weights(TINY, RECIPE, tmp_path / "a"), weights)
    with pytest.raises(UserError, match="give its sizes"):
        run.first_weights(dataclasses.replace(TINY, num_layers=3), RECIPE, tmp_path / "a")
    run.check_run(tmp_path, TINY, RECIPE, tmp_path / "a")
    with pytest.raises(UserError, match="give the same start_from"):
        run.check_run(tmp_path, TINY, RECIPE, None)


def test_what_is_exported_lies_between_the_first_weights_and_the_trained_ones(weights, tmp_path):
    export.write_checkpoint(tmp_path / "a", *weights, TINY, tokenizer=write_tokenizer(tmp_path / "t.json"), dtype="float32")
    params, bias = jax.tree.map(lambda w: w + 1, weights)
    state = loop.init_state(params, bias, RECIPE)
    equal_states(run.finished(state, TINY, tmp_path / "a", 1.0), (params, bias))
    between = run.finished(state, TINY, tmp_path / "a", 0.75)
    for got, first in zip(jax.tree.leaves(between), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(got, first + 0.75, rtol=1e-5, atol=1e-5)


def test_a_run_refuses_other_sizes_and_a_decay_of_nothing(tmp_path):
    run.check_run(tmp_path, TINY, RECIPE, None)
    with pytest.raises(UserError, match="holds a run of"):
        run.check_run(tmp_path, dataclasses.replace(TINY, num_layers=3), RECIPE, None)
    with pytest.raises(UserError, match="nothing to decay from"):
        run.phase(tmp_path, dataclasses.replace(RECIPE, decay_steps=2))


def test_muon_takes_projections_and_experts_and_leaves_the_rest_to_adam():
    axes = loop.matrix_axes(model.init_params(0, TINY))
    layer = axes.layers[1]
    assert axes.embedding is axes.head is layer.ffn.router is layer.attention.q_norm is None
    assert layer.ffn.routed.w_up == layer.attention.wo == axes.mtp.projection == optax.contrib.MuonDimensionNumbers(-2, -1)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rate = loop.learning_rate(dataclasses.replace(RECIPE, stable_steps=10, decay_steps=4))
    np.testing.assert_allclose([rate(s) for s in (0, 1, 2, 10, 11, 14, 20)], [0, 5e-3, 1e-2, 1e-2, 5e-3, 0, 0], atol=1e-8)


@pytest.mark.slow
def test_bits_per_byte_of_uniform_logits(weights):
    params, bias = weights
    silent = params._replace(head=jnp.zeros_like(params.head))
    tokens = np.arange(50, dtype=np.uint16)
    totals = evaluate.corpus_totals(silent, bias, tokens, np.full(300, 2), config=TINY, length=16)
    assert evaluate.bits_per_byte(totals) == pytest.approx(np.log2(300) / 2, rel=1e-5)
    assert totals.load.sum() == 49 * TINY.experts_per_token * (TINY.num_layers - 1)


def test_gini_and_entropy_of_even_and_lone_loads():
    even, lone = np.ones(8), np.eye(8)[0]
    assert evaluate.gini(even) == pytest.approx(0.0) and evaluate.gini(lone) == pytest.approx(7 / 8)
    assert evaluate.normalised_entropy(even) == pytest.approx(1.0) and evaluate.normalised_entropy(lone) == pytest.approx(0.0)


def test_training_text_loses_duplicates_and_what_is_held_out():
    secret = " ".join(f"word{i}" for i in range(20)) + " that no training document may have"
    common = "This paragraph is long enough to be looked at, and it comes twice in the corpus."
    forbidden = corpus.held_out_shingles({"a": corpus.Split(train=[], held_out=[secret])})
    fresh = "Only this is said once, and it is also long enough to be looked at by the filter."
    got = corpus.cleaned([f"{common}\n\n{secret}", f"{common}\n\n{fresh}"], forbidden, set())
    assert got == [common, fresh]


def test_every_document_is_on_one_side_of_the_split():
    documents = [str(i) for i in range(81)]
    found = corpus.split(documents, 40)
    assert found.held_out == ["20", "60"] and sorted(found.train + found.held_out) == sorted(documents)


def test_pairs_of_each_kind_of_source():
    assert list(pairs.from_wordnet("bier, litter (noun): a coffin")) == ["Question: What is bier?\nAnswer: a coffin"]
    climate = "temperate; desert in north; Mediterranean in central region; cool and damp in south"
    (found,) = pairs.from_factbook(f"Chile\nClimate: {climate}\ntotal: 3")
    assert found == f"Question: What is the climate of Chile?\nAnswer: {climate}"
    code = 'def f(a, b=1):\n    """Adds two numbers that are given, and returns what comes out of it, if anything."""\n'
    (found,) = pairs.from_code(code)
    assert found.startswith("Question: What does `f(a, b=1)` do in Python?\nAnswer: Adds two numbers")
    prose = "A list is sorted by its method sort, which changes the list in place, and by the function."
    section = f"Sorting things\n==============\n\n{prose}\n\nNext"
    assert next(iter(pairs.from_headings(section))).startswith("Question: Explain: Sorting things.\nAnswer: A list is sorted")


def test_html_becomes_the_text_that_a_reader_sees():
    page = "<html><head><title>no</title></head><nav>menu</nav><h1>Title</h1><p>Some  <b>bold</b>\ntext</p><pre>a\n  b</pre></html>"
    assert texts.from_html(page) == "Title\n\nSome bold text\n\na\n  b"


@pytest.mark.slow
def test_greedy_continuations_are_what_the_logits_say(weights):
    rows = np.zeros((2, 12), np.int32)
    rows[0, :8], rows[1, :3] = random_tokens(8), random_tokens(3)
    drawn = rollouts.continued(*weights, rows, jnp.array([8, 3]), jax.random.key(0), jnp.zeros(2), config=TINY, count=4)
    rows[0, 8:], rows[1, 3:7] = drawn
    likeliest = np.argmax(logits(*weights, rows, TINY), axis=-1)
    np.testing.assert_array_equal(drawn, [likeliest[0, 7:11], likeliest[1, 2:6]])


def test_repeated_8_grams():
    assert samples.repeated_share(np.arange(20)) == 0.0
    assert samples.repeated_share(np.zeros(20)) == pytest.approx(12 / 13)
    assert samples.repeated_share(np.zeros(7)) == 0.0


def test_a_token_completes_a_repeat_where_its_ngram_stands_before_it():
    tokens = jnp.array([[1, 2, 3, 1, 2, 3, 1, 2], [5, 5, 5, 5, 6, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8]])
    wanted = np.zeros((3, 8), bool)
    wanted[0, 5:] = True  # 1 2 3 again, and from there on each three
    wanted[1, [3, 7]] = True  # 5 5 5 overlaps itself once; after the 6 it must be whole again
    np.testing.assert_array_equal(repetition.completes_repeat(tokens, 3), wanted)


def test_unlikelihood_pushes_repeated_tokens_down_and_leaves_others_alone():
    logits, tokens = normal(9, 3, 7), jnp.array([2, 0, 6])
    p = jax.nn.softmax(logits)[jnp.arange(3), tokens]
    np.testing.assert_allclose(repetition.unlikelihood(logits, tokens), -jnp.log1p(-p), rtol=1e-5)
    certain = jnp.zeros((1, 7)).at[0, 2].set(60.0)  # 1 - p is 0 in float32
    gradient = jax.grad(lambda x: repetition.unlikelihood(x, jnp.array([2]))[0])(certain)
    assert gradient[0, 2] == pytest.approx(1.0)


def test_a_text_may_turn_away_where_a_word_begins_and_in_endless_words():
    begins = jnp.array([[1, 0, 0, 0, 0, 1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(repetition.may_differ(begins, 3), np.array([[1, 0, 0, 1, 1, 1, 0, 0, 1]], bool))


def test_spaces_lines_and_marks_begin_a_word_and_letters_go_on_with_one(tmp_path):
    tokenizer = corpus.train_tokenizer(["the cat\n(the 12 cats) " * 9], 300)
    tokenizer.save(str(tmp_path / "t.json"))
    starts = {tokenizer.id_to_token(i): start for i, start in enumerate(corpus.word_starts(tmp_path / "t.json"))}
    assert all(starts[token] for token in ("Ġthe", "Ċ", "(", "</s>")) and not any(starts[token] for token in ("a", "s", "1", "t"))


@pytest.mark.slow
def test_a_step_against_repetition_makes_what_was_repeated_less_likely(weights):
    params, bias = weights
    recipe = dataclasses.replace(RECIPE, repeat_weight=1.0, repeat_prompt=4, repeat_size=3)
    tokens = jnp.tile(random_tokens(2, 4), (1, 4))
    starts = jnp.ones(TINY.vocab_size, bool)
    nats, gradient = jax.jit(jax.value_and_grad(lambda p: repetition.loss_fn(p, bias, tokens, starts, TINY, recipe)[0]))(params)
    nearer = jax.tree.map(lambda w, g: w - 1e-2 * g, params, gradient)
    repeats = np.asarray(repetition.completes_repeat(tokens, 3))[:, 1:]
    chosen = lambda p: np.take_along_axis(jax.nn.softmax(logits(p, bias, tokens, TINY))[:, :-1], tokens[:, 1:, None], 2)[..., 0]  # noqa: E731
    assert nats > 0 and chosen(nearer)[repeats].mean() < chosen(params)[repeats].mean()


def test_a_recipe_refuses_what_has_no_effect():
    with pytest.raises(UserError, match="repeat_rows has no effect while repeat_weight is 0"):
        dataclasses.replace(RECIPE, repeat_rows=2)
    dataclasses.replace(RECIPE, local_weight=0.1, local_layers=1)


def test_neighbours_that_choose_alike_lose_less():
    scores = jnp.array([[4.0, 4.0, 1.0, 1.0], [4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 4.0, 4.0]])
    routing = lambda rows: model.Routing(scores[rows], jax.lax.top_k(scores[rows], 2)[1], jnp.zeros(4), jnp.int32(0))  # noqa: E731
    same, other = (loop.locality_nats(routing(jnp.array(rows)), (1, 2)) for rows in ([0, 1], [1, 2]))
    np.testing.assert_allclose([same, other], -np.log([0.8, 0.2]), rtol=1e-6)
