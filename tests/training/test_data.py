"""Batches and windows of a stream of tokens."""

import numpy as np

from specmoe_jax.training import data


def test_batches_visit_every_window_once_an_epoch():
    tokens = np.arange(101)
    seen = np.concatenate([data.batch_at(tokens, s, batch_size=3, length=10, seed=0)[:, 0] for s in range(3)])
    assert len(set(seen.tolist())) == 9
    assert (np.diff(np.sort(seen)) == 10).all()


def test_held_out_windows_predict_each_token_once():
    inputs, targets = data.held_out_windows(np.arange(10, 21), 4)
    np.testing.assert_array_equal(targets[targets >= 0], np.arange(11, 21))
    np.testing.assert_array_equal(inputs[0], [10, 11, 12, 13])
