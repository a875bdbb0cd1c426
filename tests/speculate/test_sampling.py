import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.speculate.sampling import Stream, row_keys, sample, sampling_rows, transform_logits

V = 9

jitted_transform = jax.jit(transform_logits)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, float]:
    """Hugging Face's warpers in float64 on one row, and how near the top-p border is to a token's mass.

    Deviation: of tokens with equal logits at the top-p border, the smaller ids stay.
    """
    scores = (logits.astype(np.float64) - logits.max()) / temperature
    if top_k:
        kth = np.sort(scores)[::-1][min(top_k, len(scores)) - 1]
        scores = np.where(scores < kth, -np.inf, scores)
    order = np.lexsort((np.arange(len(scores)), -scores))
    probs = np.exp(scores) / np.exp(scores).sum()
    before = np.cumsum(probs[order]) - probs[order]
    kept = np.isin(np.arange(len(scores)), order[before < top_p]) | (top_p == 1)
    probs = np.where(kept, probs, 0)
    return probs / probs.sum(), 1.0 if top_p == 1 else np.abs(before - top_p).min()


@pytest.mark.slow
@given(
    logits=hnp.arrays(
        np.float32,
        (4, V),
        # quarters for ties; steps of 2**-10, so that float32 keeps apart what float64 does
        elements=st.one_of(st.integers(-12, 12).map(lambda i: i / 4), st.integers(-10240, 10240).map(lambda i: i / 1024)),
    ),
    temperature=st.floats(0.125, 4, width=32),
    top_k=st.integers(0, V + 2),
    top_p=st.one_of(st.just(1.0), st.floats(1 / 64, 63 / 64, width=32)),
)
@settings(deadline=None, max_examples=300)
def test_transform_equals_the_reference(logits, temperature, top_k, top_p):
    wanted, margins = zip(*(reference(row, temperature, top_k, top_p) for row in logits), strict=True)
    assume(min(margins) > 1e-5)  # float32 and float64 may differ about a token that lies on the border
    rows = sampling_rows([SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)] * 4)
    np.testing.assert_allclose(jitted_transform(jnp.asarray(logits), rows), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"top_k": 1}, [0, 0.5, 0.5, 0]),  # a tie with the k-th stays
        ({"top_k": 3}, [0, 0.5, 0.5, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),  # the smallest set: of a tie, the smaller id
        ({"top_p": 0.51}, [0, 0.5, 0.5, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),  # always at least one
        ({"top_p": 1e-46}, [0, 1, 0, 0]),  # nothing in float32
        ({"top_k": 99}, [0, 0.5, 0.5, 0]),
        ({}, [0, 0.5, 0.5, 0]),
    ],
)
def test_ties_and_limits(params, wanted):
    logits = jnp.asarray([[-jnp.inf, 1.0, 1.0, -jnp.inf]])
    np.testing.assert_array_equal(transform_logits(logits, sampling_rows([SamplingParams(temperature=2.0, **params)]))[0], wanted)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"min_p": 0.5}, [0, 2 / 3, 1 / 3, 0]),  # as likely as the border: stays
        ({"min_p": 0.51}, [0, 1, 0, 0]),
        ({"min_p": 0.25, "top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
        ({"min_p": 0.99}, [0, 1, 0, 0]),
        ({"min_p": 0.0}, [0.1, 0.5, 0.25, 0.15]),
    ],
)
def test_min_p(params, wanted):
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.25, 0.15]]))
    probs = transform_logits(logits, sampling_rows([SamplingParams(temperature=1.0, **params)]))[0]
    np.testing.assert_allclose(probs, wanted, rtol=1e-5)


def test_a_temperature_beyond_float32_is_a_flat_law():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf, 3.0]])
    third = transform_logits(logits, sampling_rows([SamplingParams(temperature=1e300)]))[0]
    np.testing.assert_allclose(third, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


def test_top_p_of_a_flat_law_keeps_the_first_ids():
    probs = transform_logits(jnp.zeros((1, 8)), sampling_rows([SamplingParams(temperature=1.0, top_p=0.625)]))
    np.testing.assert_allclose(probs[0], [0.2] * 5 + [0] * 3, rtol=1e-6)


def test_top_p_just_below_one_keeps_what_float32_cannot_sum():
    logits = jax.random.normal(jax.random.key(0), (1, 50_000))
    probs = transform_logits(logits, sampling_rows([SamplingParams(temperature=1.0, top_p=float(np.nextafter(np.float32(1), 0)))]))
    assert (probs > 0).mean() > 0.99


def test_temperature_zero_is_the_first_argmax():
    probs = transform_logits(jnp.asarray([[1.0, 3.0, 3.0, 0.0]]), sampling_rows([SamplingParams()]))
    assert probs.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(("temperature", "wanted"), [(1e-38, [0, 1, 0]), (1e-6, [0, 1, 0]), (1e30, [1 / 3] * 3)])
def test_extreme_temperatures_stay_finite(temperature, wanted):
    probs = transform_logits(jnp.asarray([[-1e4, 1e4, 0.0]]), sampling_rows([SamplingParams(temperature=temperature)]))
    np.testing.assert_allclose(probs[0], wanted, rtol=1e-6)


def test_rows_apply_to_every_position_of_their_row():
    logits = jax.random.normal(jax.random.key(0), (2, 3, V))
    rows = sampling_rows([SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0)])
    probs = transform_logits(logits, rows)
    assert ((probs > 0).sum(-1) == jnp.asarray([[2], [V]])).all()


def test_limits_of_a_batch_mate_change_no_bit():
    logits = jax.random.normal(jax.random.key(0), (2, V))
    free, limited = SamplingParams(temperature=0.7), SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1)
    alone = transform_logits(logits, sampling_rows([free, free]))
    np.testing.assert_array_equal(transform_logits(logits, sampling_rows([free, limited]))[0], alone[0])


def test_sample_never_draws_probability_zero():
    probs = jnp.tile(jnp.asarray([0.0, 0.5, 0.0, 0.5, 0.0]), (2000, 1))
    ids = sample(jax.random.key(0), probs)
    assert set(ids.tolist()) == {1, 3} and ids.dtype == jnp.int32
    assert 850 < (ids == 1).sum() < 1150


def test_sample_with_a_key_a_row_covers_inner_dimensions():
    keys = row_keys([1, 2], [0, 0], [0, 0])
    probs = jnp.full((2, 50, 4), 0.25)
    ids = sample(keys, probs)
    assert ids.shape == (2, 50)
    assert (ids[0] != ids[1]).any()
    np.testing.assert_array_equal(ids[0], sample(keys[0], probs[0]))


def test_row_keys_depend_on_each_part_and_on_nothing_else():
    parts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    keys = [row_keys(*np.array(parts).T, stream=stream) for stream in Stream]
    data = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(data, axis=0)) == len(parts) * len(Stream)
    alone = row_keys([0], [1], [1])
    np.testing.assert_array_equal(jax.random.key_data(alone)[0], jax.random.key_data(keys[0])[5])


def test_seeds_are_taken_modulo_two_to_the_32():
    big = row_keys(np.array([5 + 2**32, -1], np.int64), [0, 0], [0, 0])
    small = row_keys(np.array([5, 2**32 - 1], np.uint32), [0, 0], [0, 0])
    np.testing.assert_array_equal(jax.random.key_data(big), jax.random.key_data(small))
