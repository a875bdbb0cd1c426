"""Synthetic acceptance: the rate asked for, the same draws whatever the batch mates."""

import jax
import numpy as np

from specmoe_jax.speculate.acceptance import synthetic_accept


def test_rate_and_run_lengths():
    rows, drafted, rate = 4000, 3, 0.7
    keys = jax.random.split(jax.random.key(0), rows)
    tokens = np.zeros((rows, drafted), np.int32)
    logits = np.tile(np.eye(4, 5, dtype=np.float32), (rows, 1, 1))  # the argmax of position t is t
    result = synthetic_accept(keys, tokens, logits, np.float32(rate))
    shares = [(np.asarray(result.num_accepted) >= j).mean() for j in (1, 2, 3)]
    np.testing.assert_allclose(shares, [rate, rate**2, rate**3], atol=0.03)
    np.testing.assert_array_equal(result.next_token, result.num_accepted)
    alone = synthetic_accept(keys[7:8], tokens[7:8], logits[7:8], np.float32(rate))
    assert int(alone.num_accepted[0]) == int(result.num_accepted[7])


def test_rate_zero_and_one():
    keys, tokens, logits = jax.random.split(jax.random.key(1), 5), np.zeros((5, 2), np.int32), np.zeros((5, 3, 4))
    for rate, accepted in ((0.0, 0), (1.0, 2)):
        result = synthetic_accept(keys, tokens, logits.astype(np.float32), np.float32(rate))
        assert (np.asarray(result.num_accepted) == accepted).all()
