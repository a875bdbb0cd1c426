"""The committed tokens have the target's law: exactly, by enumeration, and in 1e5 samples of the real code path.

Target and draft are tables: the logits are a function of the last two tokens, so of the whole prefix for the first
three. `BOS` stands before the first token.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import stats

from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.grammars import make_grammar, pass_masks
from specmoe_jax.speculate.acceptance import accept, accept_chances, next_distribution
from specmoe_jax.speculate.logit_edits import chain_paths, edit_kinds, edit_logits, logit_edits
from specmoe_jax.speculate.sampling import Stream, row_keys, sample, sampling_rows, transform_logits
from specmoe_jax.testing.oracles import accepted_tokens
from specmoe_jax.types import Proposal, SamplingRows

V = 4
BOS = V
EMITTED = 3


def odd_lengths_prefer_odd_tokens(ids, logits):
    """A user's processor that depends on every token before."""
    length = jnp.sum(ids >= 0)
    return jnp.where((jnp.arange(V) + length) % 2 == 0, logits + 0.3 * ids[0].astype(jnp.float32), logits - 1.0)


PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "top_k": SamplingParams(temperature=0.7, top_k=2),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "both": SamplingParams(temperature=0.9, top_k=3, top_p=0.7),
    "greedy": SamplingParams(),
}
EDITED = {
    "min_p": SamplingParams(temperature=1.2, min_p=0.2),
    "min_p, top_k": SamplingParams(temperature=1.2, min_p=0.1, top_k=3),
    "repetition_penalty": SamplingParams(temperature=1.0, repetition_penalty=1.8),
    "presence_penalty": SamplingParams(temperature=1.0, presence_penalty=1.1),
    "frequency_penalty": SamplingParams(temperature=0.8, frequency_penalty=0.9),
    "logit_bias": SamplingParams(temperature=1.0, logit_bias={0: 1.5, 2: -1.0}),
    "banned_tokens": SamplingParams(temperature=1.0, banned_tokens=(1,)),
    "logits_processor": SamplingParams(temperature=1.0, logits_processor=odd_lengths_prefer_odd_tokens),
    "all": SamplingParams(
        temperature=0.9, top_p=0.95, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={3: 0.7}, banned_tokens=(0,), logits_processor=odd_lengths_prefer_odd_tokens,
    ),
    "regex": SamplingParams(temperature=1.1, top_p=0.95, regex="(a[bc]|b[abd]|[cd]{2})[ad]{4}"),
    "greedy, repetition_penalty": SamplingParams(repetition_penalty=2.5, frequency_penalty=0.5),
}  # fmt: skip
ANSWER_TOKENS = 6  # of the regular expression: too many for an end of sequence, which these tables lack
PROMPT = (2,)  # of one token, which the repetition penalty sees and the others do not


def table(seed: int, *, banned: slice = slice(0, 0)) -> np.ndarray:
    """Logits [V+1, V+1, V] by the last two tokens; banned tokens are -inf."""
    logits = np.random.default_rng(seed).normal(scale=1.5, size=(V + 1, V + 1, V)).astype(np.float32)
    logits[..., banned] = -np.inf
    return logits


def reference_probs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What `transform_logits` computes for one row of logits, token by token in float64."""
    if params.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: params.top_k or None]
    weights = {i: np.exp((float(logits[i]) - float(logits[order[0]])) / params.temperature) for i in order}
    total, mass, probs = sum(weights.values()), 0.0, np.zeros(len(logits))
    for i in order:
        if mass < params.top_p * total:
            probs[i] = weights[i]
        mass += weights[i]
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


def reference_edit(logits: np.ndarray, params: SamplingParams, answer: tuple[int, ...]) -> np.ndarray:
    """What `edit_logits` computes for one row of logits [V], token by token."""
    edited = [float(x) for x in logits]
    for token, amount in params.logit_bias:
        edited[token] += amount
    for token in {*PROMPT, *answer}:
        edited[token] *= params.repetition_penalty if edited[token] < 0 else 1 / params.repetition_penalty
    for token in set(answer):
        edited[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    for token in params.banned_tokens:
        edited[token] = -np.inf
    if params.logits_processor is not None:
        ids = jnp.array([*PROMPT, *answer, *[-1] * 3])
        edited = np.asarray(params.logits_processor(ids, jnp.asarray(edited, jnp.float32)))
    if params.regex is not None and leads_to_a_match(params.regex, answer):  # else nothing comes here, and nothing is masked
        edited = [logit if leads_to_a_match(params.regex, (*answer, token)) else -np.inf for token, logit in enumerate(edited)]
    return np.asarray(edited)


@functools.cache
def leads_to_a_match(regex: str, tokens: tuple[int, ...]) -> bool:
    """Whether some answer that begins so matches, by trying them all."""
    text = "".join("abcd"[token] for token in tokens)
    return any(re.fullmatch(regex, text + "".join(rest)) for rest in itertools.product("abcd", repeat=ANSWER_TOKENS - len(text)))


@functools.cache
def letters() -> Tokenizer:
    """One token a letter, and an end that the tables do not know."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: token for token, letter in enumerate("abcd")}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend=backend, eos_token_ids=(V,))


def target_law(target: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Exact law [V, V, V] of the first three tokens that the target alone would emit."""
    law, known = np.zeros((V,) * EMITTED), {}

    def probs(logits, answer):
        if answer not in known:
            known[answer] = reference_probs(reference_edit(logits, params, answer), params)
        return known[answer]

    for a, b, c in np.ndindex(law.shape):
        first, second, third = probs(target[BOS, BOS], ()), probs(target[BOS, a], (a,)), probs(target[a, b], (a, b))
        law[a, b, c] = first[a] * second[b] * third[c]
    return law


def edited(logits: jax.Array, tokens: np.ndarray, answers: list[tuple[int, ...]], params: list[SamplingParams]) -> jax.Array:
    """Logits [B, N + 1, V] of a pass over drafted tokens [B, N] as the engine edits them."""
    kinds = edit_kinds(params)
    if kinds is None:
        return logits
    histories = [PROMPT + answer for answer in answers]
    edits = logit_edits(kinds, params, histories, [len(PROMPT)] * len(params), positions=9)
    if kinds.grammars:
        grammar = make_grammar(0, letters(), V + 1, (V,), params[0])
        edits = edits._replace(masks=pass_masks([(grammar, answer) for answer in answers], Proposal(tokens, None), V + 1))
    return jitted_edit(logits, edits, chain_paths(jnp.asarray(tokens)))


jitted_edit = jax.jit(edit_logits)


def logits_along(logits: np.ndarray, context: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, N+1, V] before each of tokens [B, N] and after the last, given the two tokens before, [B, 2]."""
    run = np.concatenate([context, tokens], axis=1)
    return logits[run[:, :-1], run[:, 1:]]


# Drafts: logits [B, N+1, V], params -> the law q [B, N+1, V] that a token is drawn from.


def drawn(logits, rows):
    return transform_logits(logits, rows)


def drawn_by_own_rule(logits, rows):
    """Acceptance needs the true q, not the target's transforms."""
    return jax.nn.softmax(0.5 * logits, axis=-1)


def picked(logits, rows):
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), V, dtype=jnp.float32)


TARGET = table(0)
CASES = {  # target, draft, law of the draft, whether acceptance is told q
    "stochastic": (TARGET, table(1), drawn, True),
    "own_rule": (TARGET, table(1), drawn_by_own_rule, True),
    "point_mass": (TARGET, table(1), picked, False),
    "point_mass_told": (TARGET, table(1), picked, True),
    "equal": (TARGET, TARGET, drawn, True),
    "disjoint": (table(0, banned=slice(0, 2)), table(1, banned=slice(2, 4)), drawn, True),
}


@functools.partial(jax.jit, static_argnames=("law", "told"))
def step_algebra(target_logits, draft_logits, drafts, rows, *, law, told):
    """q of each drafted token [B, N], chance of each [B, N], law of the next token after n = 0..N, [N+1, B, V]."""
    q = law(draft_logits, rows)[:, :-1]
    p = transform_logits(target_logits, rows)
    said = q if told else None
    chances = accept_chances(drafts, said, p)
    after = [next_distribution(jnp.full(len(drafts), n, jnp.int32), drafts, said, p) for n in range(drafts.shape[1] + 1)]
    return jnp.take_along_axis(q, drafts[..., None], axis=-1)[..., 0], chances, jnp.stack(after)


def step_law(context, draft_length, target, draft, law, told, params) -> dict[tuple[int, ...], float]:
    """Law of what one step emits, 1 to N+1 tokens, over every outcome of the draft."""
    drafts = np.array(list(itertools.product(range(V), repeat=draft_length)), np.int32)
    contexts = np.tile(np.array(context, np.int32), (len(drafts), 1))
    answers = [tuple(token for token in context if token != BOS)] * len(drafts)
    along = [
        edited(jnp.asarray(logits_along(logits, contexts, drafts)), drafts, answers, [params] * len(drafts))
        for logits in (target, draft)
    ]
    rows = sampling_rows([params] * len(drafts))
    q, chances, after = (np.asarray(x, np.float64) for x in step_algebra(*along, jnp.asarray(drafts), rows, law=law, told=told))
    emitted = {}
    for b, run in enumerate(drafts):
        for n in range(draft_length + 1):
            falls = 1 - chances[b, n] if n < draft_length else 1.0
            mass = q[b].prod() * chances[b, :n].prod() * falls
            for token in range(V):
                key = (*run[:n].tolist(), token)
                emitted[key] = emitted.get(key, 0.0) + mass * after[n, b, token]
    return emitted


def joint_law(step) -> np.ndarray:
    """Exact law [V, V, V] of the first three tokens, step after step. step: context -> {tokens of the step: probability}."""
    step = functools.cache(step)
    law = np.zeros((V,) * EMITTED)

    def extend(prefix: tuple[int, ...], mass: float) -> None:
        for tokens, chance in step((BOS, BOS, *prefix)[-2:]).items():
            line = prefix + tokens
            if len(line) >= EMITTED:
                law[line[:EMITTED]] += mass * chance
            elif mass * chance > 0:
                extend(line, mass * chance)

    extend((), 1.0)
    return law


def speculative_law(draft_length, *case) -> np.ndarray:
    """Exact law [V, V, V] of the first three tokens that speculation commits."""
    return joint_law(lambda context: step_law(context, draft_length, *case))


@pytest.mark.parametrize("draft_length", [1, 2, 3])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_joint_law_is_the_targets(case, params, draft_length):
    target = case[0]
    np.testing.assert_allclose(speculative_law(draft_length, *case, params), target_law(target, params), atol=1e-6, rtol=0)


@pytest.mark.every_case
@pytest.mark.parametrize("params", EDITED.values(), ids=EDITED.keys())
def test_joint_law_of_edited_logits_is_the_targets(params):
    for case in ("stochastic", "point_mass"):
        law = speculative_law(2, *CASES[case], params)
        np.testing.assert_allclose(law, target_law(TARGET, params), atol=1e-5, rtol=0)
        if params.temperature:  # the edit does something
            assert np.abs(law - target_law(TARGET, SamplingParams(temperature=params.temperature))).max() > 1e-3


def test_the_law_sees_an_edit_that_forgets_the_drafted_tokens():
    """Penalties by what was committed alone: the second token of a step would have another law."""
    params, drafts = EDITED["presence_penalty"], np.array([[1]], np.int32)
    logits = jnp.asarray(logits_along(TARGET, np.array([[BOS, BOS]]), drafts))
    right = edited(logits, drafts, [()], [params])
    forgetful = jitted_edit(logits, logit_edits(edit_kinds([params]), [params], [PROMPT], [1], 9), jnp.full((1, 2, 1), -1))
    np.testing.assert_allclose(right[0, 1], reference_edit(logits[0, 1], params, (1,)), atol=1e-6)
    assert np.abs(np.asarray(right - forgetful)).max() > 1


def test_the_enumeration_sees_a_biased_draft():
    """Argmax picks told as softmax draws: the algebra is wrong by far more than the tolerance."""
    params = PARAMS["plain"]
    p = jnp.asarray(TARGET[BOS, BOS])[None, None].repeat(2, axis=1)
    q = jax.nn.softmax(jnp.asarray(table(1)[BOS, BOS]))[None, None]
    token = jnp.argmax(q, axis=-1).astype(jnp.int32)
    probs = transform_logits(p, sampling_rows([params]))
    chance = accept_chances(token, q, probs)[0, 0]
    law = chance * jax.nn.one_hot(token[0, 0], V) + (1 - chance) * next_distribution(jnp.zeros(1, jnp.int32), token, q, probs)[0]
    assert np.abs(np.asarray(law) - np.asarray(probs[0, 0])).max() > 1e-2


# Statistics of the real code path.

SAMPLES = 100_000
DRAFT_LENGTH = 2


@functools.partial(jax.jit, static_argnames="law")
def draft_one(keys, j, draft_logits, rows, *, law):
    q = law(draft_logits, rows)
    return sample(jax.vmap(jax.random.fold_in, (0, None))(keys, j), q), q


jitted_accept = jax.jit(accept)


def generate(target, draft, law, rows: SamplingRows, *, told: str, seed: int, params=None) -> np.ndarray:
    """Runs draft and accept until every row has three tokens, [B, 3]. told: q, none or softmax. params: of all rows, if logits
    are edited."""
    batch = len(rows.temperature)

    def edit(logits, tokens):
        if params is None:
            return logits
        answers = [tuple(line[2:end].tolist()) for line, end in zip(lines, lengths, strict=True)]
        return edited(logits, tokens, answers, [params] * batch)

    seeds, ids = np.full(batch, seed), np.arange(batch)
    lines = np.full((batch, 2 + EMITTED * (DRAFT_LENGTH + 1)), BOS, np.int32)
    lengths = np.full(batch, 2)
    column = np.arange(batch)[:, None]
    for _ in range(EMITTED):  # a step commits at least one token
        context = lines[column, lengths[:, None] + [-2, -1]]
        draft_keys = row_keys(seeds, ids, lengths, stream=Stream.DRAFT)
        tokens, qs = np.zeros((batch, 0), np.int32), []
        for j in range(DRAFT_LENGTH):
            logits = edit(jnp.asarray(logits_along(draft, context, tokens)), tokens)[:, -1]
            token, q = draft_one(draft_keys, np.uint32(j), logits, rows, law=law)
            tokens = np.concatenate([tokens, np.asarray(token)[:, None]], axis=1)
            qs.append(jax.nn.softmax(logits, axis=-1) if told == "softmax" else q)
        probs = None if told == "none" else jnp.stack(qs, axis=1)
        target_logits = edit(jnp.asarray(logits_along(target, context, tokens)), tokens)
        result = jitted_accept(row_keys(seeds, ids, lengths), jnp.asarray(tokens), probs, target_logits, rows)
        lines[column, lengths[:, None] + np.arange(DRAFT_LENGTH + 1)] = np.asarray(accepted_tokens(tokens, result))
        lengths = lengths + np.asarray(result.num_accepted) + 1
    return lines[:, 2 : 2 + EMITTED]


def p_value(strings: np.ndarray, law: np.ndarray) -> float:
    """Chi-square test of strings [n, 3] against their exact law; strings expected fewer than 5 times share a bin."""
    counts = np.bincount(np.ravel_multi_index(strings.T, law.shape), minlength=law.size)
    expected = law.ravel() * len(strings)
    assert counts[expected == 0].sum() == 0, "a string that the target cannot emit"
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    kept = expected > 0
    return stats.chisquare(counts[kept], expected[kept] * counts.sum() / expected.sum()).pvalue


def same_rows(params: SamplingParams) -> SamplingRows:
    return sampling_rows([params] * SAMPLES)


@pytest.mark.parametrize("params", ["plain", "both"])
@pytest.mark.parametrize(("law", "told"), [(drawn, "q"), (picked, "none")], ids=["stochastic", "point_mass"])
def test_samples_follow_the_target(law, told, params):
    strings = generate(TARGET, table(1), law, same_rows(PARAMS[params]), told=told, seed=7)
    assert p_value(strings, target_law(TARGET, PARAMS[params])) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("params", EDITED.values(), ids=EDITED.keys())
def test_samples_of_edited_logits_follow_the_target(params):
    some = sampling_rows([params] * (SAMPLES // 4))
    strings = generate(TARGET, table(1), drawn, some, told="q", seed=9, params=params)
    law = target_law(TARGET, params)
    if params.temperature == 0:
        assert (strings == np.unravel_index(law.argmax(), law.shape)).all()
    else:
        assert p_value(strings, law) > 1e-4


def test_samples_of_mixed_rows_follow_each_rows_own_law():
    names = ["plain", "top_p", "greedy", "top_k"]
    rows = sampling_rows([PARAMS[name] for name in names] * (SAMPLES // len(names)))
    strings = generate(TARGET, table(1), drawn, rows, told="q", seed=8)
    for i, name in enumerate(names):
        law = target_law(TARGET, PARAMS[name])
        if name == "greedy":
            assert (strings[i :: len(names)] == np.unravel_index(law.argmax(), law.shape)).all()
        else:
            assert p_value(strings[i :: len(names)], law) > 1e-4


def test_negative_control_argmax_draft_with_its_softmax_is_caught():
    strings = generate(TARGET, table(1), picked, same_rows(PARAMS["plain"]), told="softmax", seed=7)
    assert p_value(strings, target_law(TARGET, PARAMS["plain"])) < 1e-6
