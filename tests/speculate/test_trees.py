"""Trees of drafted tokens: their shape, their growth, and that what is committed has the target's law, exactly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling_law import BOS, PARAMS, V, joint_law, p_value, reference_probs, table, target_law

from specmoe_jax.speculate.sampling import row_keys, sampling_rows
from specmoe_jax.speculate.trees import _walk, accept_tree, accept_tree_coupled, accept_tree_greedy, decided_path, make_tree, rerank

# parents of the nodes after the root
SHAPES = {
    "chain": (0, 1),
    "siblings": (0, 0, 0),
    "fork": (0, 0, 1, 1, 2),
    "deep": (0, 1, 0, 2, 3),
}


def ancestors(parents, node):
    """The node and all above it but the root, from the node up; by hand."""
    line = []
    while node:
        line.append(node)
        node = parents[node - 1]
    return line


TREES = st.tuples(*(st.integers(0, i) for i in range(6)))  # of one size, so that each program compiles once


jitted_tree = jax.jit(make_tree, static_argnums=1)
jitted_greedy = jax.jit(accept_tree_greedy, static_argnames="depth")
jitted_rerank = jax.jit(rerank, static_argnums=3)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_depths_and_mask_are_those_of_the_parents(parents):
    tree = jitted_tree(np.array([parents], np.int32), len(parents))
    for node in range(len(parents) + 1):
        above = ancestors(parents, node)
        assert tree.depths[0, node] == len(above)
        assert set(np.flatnonzero(tree.mask[0, node]).tolist()) == {0, *above}


def test_a_chain_is_a_tree_without_branches():
    tree = make_tree(jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (2, 3)), 3)
    np.testing.assert_array_equal(tree.depths, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(tree.mask[0], np.tril(np.ones((4, 4), bool)))


@settings(max_examples=60, deadline=None)
@given(TREES, st.data())
def test_greedy_takes_the_longest_path_of_argmax_tokens(parents, data):
    """Against all paths tried one by one; tokens may repeat among siblings."""
    draw = lambda n: np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.int32)  # noqa: E731
    tokens, choice = draw(len(parents)), draw(len(parents) + 1)
    logits = np.eye(3, dtype=np.float32)[choice][None]
    tree = jitted_tree(np.array([parents], np.int32), len(parents))
    result = jitted_greedy(tokens[None], tree, logits, depth=len(parents))
    good = [[]]
    for node in range(1, len(parents) + 1):
        path = ancestors(parents, node)[::-1]
        if all(tokens[n - 1] == choice[above] for n, above in zip(path, [0, *path], strict=False)):
            good.append(path)
    count = int(result.num_accepted[0])
    if len({*zip(parents, tokens.tolist(), strict=True)}) == len(parents):  # siblings differ, as a draft's do
        assert count == max(map(len, good))
    path = result.path[0, :count].tolist()
    assert path in good and not result.path[0, count:].any()
    last = path[-1] if path else 0
    assert result.next_token[0] == choice[last]
    assert not any(parents[n - 1] == last and tokens[n - 1] == choice[last] for n in range(1, len(parents) + 1))


def test_a_step_is_told_where_nodes_of_the_path_without_a_distribution_begin():
    """Of four rows alike the second joins in this pass, the third has a NaN on its path and the fourth one beside it."""
    tree = make_tree(jnp.broadcast_to(jnp.array([0, 0, 2, 2], jnp.int32), (4, 4)), 2)
    tokens = jnp.broadcast_to(jnp.array([1, 2, 0, 1], jnp.int32), (4, 4))
    logits = jnp.broadcast_to(jnp.eye(3)[jnp.array([2, 0, 1, 0, 0])], (4, 5, 3)).at[2, 4, 1].set(jnp.nan).at[3, 1, 1].set(jnp.nan)
    active = np.array([True, False, True, True])
    accepted, told = decided_path(accept_tree_greedy)(tokens=tokens, tree=tree, logits=logits, active=active, depth=2)
    *path, num_accepted, next_token, sound = told.T
    assert np.stack(path, axis=1).tolist() == accepted.path.tolist() == [[2, 4]] * 4
    assert num_accepted.tolist() == accepted.num_accepted.tolist() == [2, 0, 2, 2]
    assert sound.tolist() == [3, 3, 2, 3] and next_token.tolist() == accepted.next_token.tolist()
    assert next_token[jnp.array([0, 1, 3])].tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reranking_keeps_the_best_with_their_ancestors(data):
    """Ties included: a parent is never left out for a child as probable as itself."""
    count = 8
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(count)]
    scores = np.zeros(count, np.float32)
    for i, parent in enumerate(parents):
        scores[i] = (scores[parent] if parent >= 0 else 0) - data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    keep = data.draw(st.integers(1, count))
    arrays = (np.arange(100, 100 + count, dtype=np.int32), scores, np.array(parents, np.int32))
    tokens, nodes = (np.asarray(a[0]) for a in jitted_rerank(*(a[None] for a in arrays), keep))
    chosen = (tokens - 100).tolist()
    assert sorted(scores[chosen].tolist()) == sorted(scores.tolist())[count - keep :]
    for i, candidate in enumerate(chosen):
        above = parents[candidate]
        assert nodes[i] == (0 if above < 0 else 1 + chosen.index(above)) and nodes[i] <= i


# The law. Target and draft are tables as in test_lossless; a node's token is the draft's best, second, ... by sibling rank.


def drafted_tree(context, parents, draft) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Tokens of the nodes after the root, and of every node the text up to it."""
    texts, tokens = [tuple(context)], []
    for node, parent in enumerate(parents):
        rank = sum(p == parent for p in parents[:node])
        token = int(np.argsort(-draft[texts[parent][-2:]], kind="stable")[rank])
        tokens.append(token)
        texts.append((*texts[parent], token))
    return np.array(tokens, np.int32), texts


@functools.partial(jax.jit, static_argnames="depth")
def walk_all(choices, tokens, parents, depth):
    n = len(choices)
    tree = make_tree(jnp.broadcast_to(parents, (n, len(parents))), depth)
    return _walk(choices, jnp.broadcast_to(tokens, (n, len(tokens))), tree, depth)


def step_law(context, parents, target, draft, params) -> dict[tuple[int, ...], float]:
    """Law of what one step commits: the real walk under every outcome of the target's draws at the nodes."""
    tokens, texts = drafted_tree(context, parents, draft)
    probs = np.stack([reference_probs(target[text[-2:]], params) for text in texts])  # [T, V]
    choices = np.array(list(itertools.product(range(V), repeat=len(texts))), np.int32)
    mass = np.prod(probs[np.arange(len(texts)), choices], axis=1)
    result = walk_all(choices, tokens, np.array(parents, np.int32), len(parents))
    path, accepted, following = (np.asarray(x) for x in result)
    law = {}
    for i in np.flatnonzero(mass):
        line = (*tokens[path[i, : accepted[i]] - 1].tolist(), int(following[i]))
        law[line] = law.get(line, 0.0) + mass[i]
    return law


def sibling_law(context, parents, target, draft, params, *, rule) -> dict[tuple[int, ...], float]:
    """The same by the other description: children one by one, rule(p, q, token) -> chance and what p becomes when it falls."""
    tokens, texts = drafted_tree(context, parents, draft)
    law = {}

    def visit(node: int, line: tuple[int, ...], mass: float) -> None:
        p = reference_probs(target[texts[node][-2:]], params)
        q = np.exp(draft[texts[node][-2:]].astype(np.float64))
        q /= q.sum()
        for child in (i + 1 for i, parent in enumerate(parents) if parent == node):
            chance, rest = rule(p, q, tokens[child - 1])
            visit(child, (*line, int(tokens[child - 1])), mass * chance)
            mass, p = mass * (1 - chance), rest
        for token in range(V):
            law[(*line, token)] = law.get((*line, token), 0.0) + mass * p[token]

    visit(0, (), 1.0)
    return law


def one_by_one(p, q, token):
    rest = np.where(np.arange(V) == token, 0.0, p)
    return p[token], rest / rest.sum() if rest.sum() > 0 else p


def as_if_drawn(p, q, token):
    """The classic mistake: min(1, p / q) for a token that was picked, not drawn from q."""
    rest = np.maximum(p - q, 0.0)
    return min(1.0, p[token] / q[token]), rest / rest.sum() if rest.sum() > 0 else p


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("shape", SHAPES)
def test_joint_law_is_the_targets(shape, params):
    target, draft = table(0), table(1)
    law = joint_law(lambda context: step_law(context, SHAPES[shape], target, draft, params))
    np.testing.assert_allclose(law, target_law(target, params), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_at_the_node_is_trying_its_children_one_by_one(shape):
    args = ((BOS, 2), SHAPES[shape], table(0), table(1), PARAMS["plain"])
    by_draws, by_children = step_law(*args), sibling_law(*args, rule=one_by_one)
    for line in by_draws.keys() | by_children.keys():
        assert by_draws.get(line, 0.0) == pytest.approx(by_children.get(line, 0.0), abs=1e-9)


def test_the_enumeration_sees_a_biased_rule():
    """Negative control: top-k children treated as draws from the softmax."""
    target, draft, params = table(0), table(1), PARAMS["plain"]
    law = joint_law(lambda context: sibling_law(context, SHAPES["fork"], target, draft, params, rule=as_if_drawn))
    assert np.abs(law - target_law(target, params)).max() > 1e-2


SAMPLES = 60_000


@pytest.mark.parametrize("coupled", [False, True], ids=["drawn", "coupled"])
@pytest.mark.parametrize("params", ["plain", "top_k"])
def test_samples_follow_the_target(params, coupled):
    """The keyed code itself, over two generations and the token after them."""
    parents = SHAPES["fork"]
    tokens, texts = drafted_tree((BOS, BOS), parents, table(1))
    logits = np.stack([table(0)[text[-2:]] for text in texts])
    rows = sampling_rows([PARAMS[params]] * SAMPLES)
    ids = np.arange(SAMPLES)
    tree = make_tree(jnp.broadcast_to(np.array(parents, np.int32), (SAMPLES, len(parents))), 2)
    many = [np.broadcast_to(a, (SAMPLES, *a.shape)) for a in (tokens, logits)]
    if coupled:
        keys = jax.vmap(lambda depth: row_keys(np.full(SAMPLES, 3), ids, jnp.full(SAMPLES, depth)), out_axes=1)(jnp.arange(3))
        result = jax.jit(accept_tree_coupled, static_argnames="depth")(keys, many[0], tree, many[1], rows, depth=2)
    else:
        keys = row_keys(np.full(SAMPLES, 3), ids, ids * 0)
        result = jax.jit(accept_tree, static_argnames="depth")(keys, many[0], tree, many[1], rows, depth=2)
    exact = step_law((BOS, BOS), parents, table(0), table(1), PARAMS[params])
    law, seen = np.zeros((V + 1,) * 3), np.full((SAMPLES, 3), V)  # V stands for "nothing"
    for line, mass in exact.items():
        law[(*line, *[V] * (3 - len(line)))] += mass
    path, accepted, following = (np.asarray(x) for x in result)
    for depth in range(2):
        taken = depth < accepted
        seen[taken, depth] = tokens[path[taken, depth] - 1]
    seen[ids, accepted] = following
    assert p_value(seen, law) > 1e-4
