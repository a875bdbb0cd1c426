import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.speculate.acceptance import accept, accept_greedy, accept_probability, decided, finite_positions, residual
from specmoe_jax.speculate.sampling import row_keys, sample, sampling_rows, transform_logits
from specmoe_jax.testing.oracles import accepted_tokens
from specmoe_jax.types import AcceptResult, SamplingRows

V = 6
KEY = jax.random.key(0)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0)

jitted_accept = jax.jit(accept)


def choosing(tokens) -> jax.Array:
    """Logits [B, T, V] whose argmax is tokens [B, T]."""
    return jax.nn.one_hot(jnp.asarray(tokens), V, dtype=jnp.float32)


def as_lists(result: AcceptResult) -> tuple[list[int], list[int]]:
    return result.num_accepted.tolist(), result.next_token.tolist()


def take(x, rows):
    """Rows of an array or of every array of a tuple."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], x)


@pytest.fixture(scope="module")
def batch():
    """Eight different sampled and greedy rows with their keys: arguments of `accept`."""
    rng = np.random.default_rng(3)
    names = [GREEDY, SAMPLED, SamplingParams(temperature=0.7, top_k=3), SamplingParams(temperature=1.2, top_p=0.6)]
    rows = sampling_rows(names * 2)
    target, draft = (jnp.asarray(rng.normal(size=(8, n, V)), jnp.float32) for n in (5, 4))
    probs = transform_logits(draft, rows)
    keys = row_keys(np.arange(8) // 3, np.arange(8), np.arange(8) + 10)
    return keys, sample(jax.random.key(1), probs), probs, target, rows


# Greedy: scripted traces.

TRACES = {  # target's choices [N+1], drafted [N], accepted, next
    "all": ([1, 2, 3, 4], [1, 2, 3], 3, 4),
    "none": ([1, 2, 3, 4], [0, 2, 3], 0, 1),
    "prefix_only": ([1, 2, 3, 4], [1, 0, 3], 1, 2),
    "all_but_last": ([5, 5, 5, 0], [5, 5, 1], 2, 5),
    "no_proposal": ([1, 2, 3, 4], [1, -1, -1], 1, 2),
    "beyond_vocabulary": ([5, 5, 5, 5], [V, 5, 5], 0, 5),
}


def by_greedy(drafted, logits):
    return accept_greedy(drafted, logits)


def by_params(drafted, logits):
    return accept(KEY, drafted, None, logits, GREEDY)


def by_rows(drafted, logits):
    return jitted_accept(KEY, drafted, None, logits, sampling_rows([GREEDY] * len(drafted)))


def by_drawn_rows(drafted, logits):
    """The draft claims a law that is not the one-hot of a greedy row."""
    uniform = jnp.full((*drafted.shape, V), 1 / V, jnp.float32)
    return jitted_accept(KEY, drafted, uniform, logits, sampling_rows([GREEDY] * len(drafted)))


@pytest.mark.parametrize("path", [by_greedy, by_params, by_rows, by_drawn_rows])
def test_greedy_traces_in_one_ragged_batch(path):
    choices, drafted, accepted, following = zip(*TRACES.values(), strict=True)
    result = path(jnp.asarray(drafted), choosing(choices))
    assert as_lists(result) == (list(accepted), list(following))
    assert result.num_accepted.dtype == result.next_token.dtype == jnp.int32


@pytest.mark.parametrize("path", [by_greedy, by_params, by_rows])
def test_greedy_ties_go_to_the_smaller_id(path):
    logits = jnp.asarray([[[0, 1, 1, 0, 0, 1], [2, 0, 0, 0, 0, 2]]], jnp.float32)
    assert as_lists(path(jnp.asarray([[1]]), logits)) == ([1], [0])
    assert as_lists(path(jnp.asarray([[2]]), logits)) == ([0], [1])


@given(
    logits=hnp.arrays(np.float32, (3, 4, V), elements=st.integers(-2, 2).map(float)),
    drafted=hnp.arrays(np.int32, (3, 3), elements=st.integers(-1, V - 1)),
)
@settings(deadline=None, max_examples=50)
def test_greedy_paths_agree(logits, drafted):
    wanted = as_lists(accept_greedy(jnp.asarray(drafted), jnp.asarray(logits)))
    assert as_lists(by_rows(jnp.asarray(drafted), jnp.asarray(logits))) == wanted
    assert as_lists(by_drawn_rows(jnp.asarray(drafted), jnp.asarray(logits))) == wanted


# Sampling: cases with one possible outcome.


@pytest.mark.slow
def test_a_draft_equal_to_the_target_is_always_accepted():
    logits = jax.random.normal(KEY, (500, 4, V)) * 3
    rows = sampling_rows([SamplingParams(temperature=0.8, top_p=0.9)] * 500)
    probs = transform_logits(logits[:, :-1], rows)
    result = jitted_accept(KEY, sample(jax.random.key(1), probs), probs, logits, rows)
    assert (result.num_accepted == 3).all()


def test_a_token_outside_the_targets_support_falls_and_does_not_come_back():
    rows = sampling_rows([SamplingParams(temperature=1.0, top_k=2)] * 300)
    logits = jnp.tile(jnp.asarray([3.0, 2.9, 1.0, 0.0, 0.0, 0.0]), (300, 2, 1))
    result = jitted_accept(KEY, jnp.full((300, 1), 2), None, logits, rows)
    assert (result.num_accepted == 0).all()
    assert set(result.next_token.tolist()) == {0, 1}


def test_a_rejected_point_mass_is_not_drawn_again():
    logits = jnp.zeros((300, 2, V))
    result = jitted_accept(KEY, jnp.full((300, 1), 2), None, logits, sampling_rows([SAMPLED] * 300))
    fell = result.num_accepted == 0
    assert 0 < fell.sum() < 300
    assert set(result.next_token[fell].tolist()) == {0, 1, 3, 4, 5}
    assert set(result.next_token[~fell].tolist()) == set(range(V))


def test_without_drafted_tokens_the_token_is_the_targets():
    rows = sampling_rows([SAMPLED] * 4)
    logits = jnp.where(choosing([[1], [2], [3], [4]]) > 0, 0.0, -jnp.inf)
    for probs in (None, jnp.zeros((4, 0, V))):
        assert as_lists(accept(KEY, jnp.zeros((4, 0), jnp.int32), probs, logits, rows)) == ([0] * 4, [1, 2, 3, 4])


def test_no_proposal_draws_from_the_target():
    logits = jnp.where(choosing([[3, 1]]) > 0, 0.0, -jnp.inf)
    rows = sampling_rows([SAMPLED])
    for probs in (None, jnp.zeros((1, 1, V))):
        assert as_lists(accept(KEY, jnp.asarray([[-1]]), probs, logits, rows)) == ([0], [3])


# The algebra's edges.


def test_accept_probability_edges():
    p = jnp.asarray([0.2, 0.4, 0.0, 0.3, 0.0, 1.0])
    q = jnp.asarray([0.4, 0.2, 0.5, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(accept_probability(p, q), [0.5, 1, 0, 1, 0, 1], rtol=1e-7)


def test_residual_of_equal_laws_is_the_law():
    p = jnp.asarray([0.25, 0.5, 0.25])
    np.testing.assert_array_equal(residual(p, p), p)
    np.testing.assert_array_equal(residual(p, p + jnp.float32(6e-8)), p)


def test_a_small_residual_beside_a_point_mass_is_kept():
    p = jnp.asarray([1.0, 3e-9, 1e-9])
    np.testing.assert_allclose(residual(p, jnp.asarray([1.0, 0.0, 0.0])), [0, 0.75, 0.25], rtol=1e-6)


def test_accepted_tokens():
    result = AcceptResult(num_accepted=jnp.asarray([0, 1, 2]), next_token=jnp.asarray([7, 8, 9]))
    tokens = accepted_tokens(jnp.asarray([[1, 2], [3, 4], [5, 6]]), result)
    assert tokens.tolist() == [[7, -1, -1], [3, 8, -1], [5, 6, 9]]


# Rows are independent.


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_rows_do_not_depend_on_their_batch_mates(batch, told):
    keys, tokens, probs, target, rows = batch
    args = (keys, tokens, probs if told else None, target, rows)
    whole = jitted_accept(*args)
    for subset in ([5, 2, 7, 0, 1, 6, 4, 3], [6], list(range(8)) * 3):
        result = jitted_accept(*take(args, subset))
        for part, full in zip(result, whole, strict=True):
            np.testing.assert_array_equal(part, full[np.asarray(subset)])


@pytest.mark.slow
def test_mixed_rows_equal_rows_of_their_kind(batch):
    """A sampled row among rows with top-k and top-p, which take another branch, keeps its bits."""
    target, rows = batch[3], batch[4]
    plain = take(rows, [1, 5])
    among_others = transform_logits(target, rows)[jnp.asarray([1, 5])]
    np.testing.assert_array_equal(among_others, transform_logits(take(target, [1, 5]), plain))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_row_that_is_not_finite_harms_no_other(batch, params):
    keys, tokens, _, target, _ = batch
    broken = target.at[2, 1, 3].set(jnp.nan).at[4, 0].set(-jnp.inf).at[6, 4, 0].set(jnp.inf)
    assert finite_positions(broken).all(axis=1).tolist() == [True, True, False, True, False, True, False, True]
    assert finite_positions(target.at[0, 0, 0].set(-jnp.inf)).all()
    result = accept(keys, tokens, None, broken, params)
    assert ((result.next_token >= 0) & (result.next_token < V)).all()
    assert ((result.num_accepted >= 0) & (result.num_accepted <= 4)).all()
    kept = np.asarray(finite_positions(broken)).all(axis=1)
    for part, full in zip(result, accept(keys, tokens, None, target, params), strict=True):
        np.testing.assert_array_equal(part[kept], full[kept])


def test_a_step_is_told_where_positions_without_a_distribution_begin(batch):
    keys, tokens, probs, target, rows = batch
    broken = target.at[2, 1, 3].set(jnp.nan).at[4, 0].set(-jnp.inf).at[6, 4, 0].set(jnp.inf)
    given = {"keys": keys, "draft_tokens": tokens, "draft_probs": probs, "target_logits": broken, "params": rows}
    num_accepted, next_token, sound = decided(accept)(**given)
    assert sound.tolist() == [5, 5, 1, 5, 0, 5, 4, 5]
    kept = np.asarray(sound) == 5  # elsewhere programs may differ: NaN is in their arguments
    for part, alone in zip((num_accepted, next_token), jitted_accept(**given), strict=True):
        np.testing.assert_array_equal(part[kept], alone[kept])


# The face.


def test_one_key_serves_the_batch_and_old_keys_work(batch):
    _, tokens, probs, target, rows = batch
    new = accept(KEY, tokens, probs, target, rows)
    old = accept(jax.random.PRNGKey(0), tokens, probs, target, rows)
    assert as_lists(new) == as_lists(old)


def test_params_of_one_request_serve_all_rows(batch):
    keys, tokens, probs, target, _ = batch
    one = accept(keys, tokens, probs, target, SAMPLED)
    assert as_lists(one) == as_lists(accept(keys, tokens, probs, target, sampling_rows([SAMPLED] * 8)))


def test_edits_that_come_before_are_refused(batch):
    keys, tokens, probs, target, _ = batch
    with pytest.raises(ValueError, match="params asks for edits of logits"):
        accept(keys, tokens, probs, target, SamplingParams(temperature=1.0, banned_tokens=(1,)))


def test_values_of_the_rows_do_not_recompile(batch):
    keys, tokens, probs, target, rows = batch
    fresh = jax.jit(lambda *args: accept(*args))
    fresh(keys, tokens, probs, target, rows)
    fresh(keys, tokens, probs, target, SamplingRows(*(x[::-1].copy() for x in rows)))
    assert fresh._cache_size() == 1


def test_shapes_that_disagree_are_refused(batch):
    keys, tokens, probs, target, rows = batch
    with pytest.raises(ValueError, match=r"target_logits has shape \(8, 4, 6\); 4 drafted tokens in 8 rows need \(8, 5, 6\)"):
        accept(keys, tokens, probs, target[:, :-1], rows)
    with pytest.raises(ValueError, match=r"draft_probs has shape \(8, 3, 6\); it must be \(8, 4, 6\)"):
        accept(keys, tokens, probs[:, :-1], target, rows)
