"""The committed tokens have the target's law: exactly, by enumeration, and in 1e5 samples of the real code path.

Target and draft are tables: the logits are a function of the last two tokens, so of the whole prefix for the first
three. `BOS` stands before the first token.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.speculate.acceptance import accept, accept_chances, next_distribution
from specmoe_jax.speculate.sampling import Stream, row_keys, sample, sampling_rows, transform_logits
from specmoe_jax.testing.oracles import accepted_tokens
from specmoe_jax.types import SamplingRows

V = 4
BOS = V
EMITTED = 3

PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "top_k": SamplingParams(temperature=0.7, top_k=2),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "both": SamplingParams(temperature=0.9, top_k=3, top_p=0.7),
    "greedy": SamplingParams(),
}


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
    return probs / probs.sum()


def target_law(target: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Exact law [V, V, V] of the first three tokens that the target alone would emit."""
    law = np.zeros((V,) * EMITTED)
    for a, b, c in np.ndindex(law.shape):
        steps = [(target[BOS, BOS], a), (target[BOS, a], b), (target[a, b], c)]
        law[a, b, c] = np.prod([reference_probs(logits, params)[token] for logits, token in steps])
    return law


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
    along = [jnp.asarray(logits_along(logits, contexts, drafts)) for logits in (target, draft)]
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


def generate(target, draft, law, rows: SamplingRows, *, told: str, seed: int) -> np.ndarray:
    """Runs draft and accept until every row has three tokens, [B, 3]. told: q, none or softmax."""
    batch = len(rows.temperature)
    seeds, ids = np.full(batch, seed), np.arange(batch)
    lines = np.full((batch, 2 + EMITTED * (DRAFT_LENGTH + 1)), BOS, np.int32)
    lengths = np.full(batch, 2)
    column = np.arange(batch)[:, None]
    for _ in range(EMITTED):  # a step commits at least one token
        context = lines[column, lengths[:, None] + [-2, -1]]
        draft_keys = row_keys(seeds, ids, lengths, stream=Stream.DRAFT)
        tokens, qs = np.zeros((batch, 0), np.int32), []
        for j in range(DRAFT_LENGTH):
            logits = jnp.asarray(logits_along(draft, context, tokens)[:, -1])
            token, q = draft_one(draft_keys, np.uint32(j), logits, rows, law=law)
            tokens = np.concatenate([tokens, np.asarray(token)[:, None]], axis=1)
            qs.append(jax.nn.softmax(logits, axis=-1) if told == "softmax" else q)
        probs = None if told == "none" else jnp.stack(qs, axis=1)
        target_logits = jnp.asarray(logits_along(target, context, tokens))
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
