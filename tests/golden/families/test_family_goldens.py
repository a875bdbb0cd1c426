"""model.logits of every family against what transformers computed, kept in golden files: needs no torch."""

import pathlib

import numpy as np
import pytest

from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS, WITH_TOWERS, tiny_family

TOLERANCE = 1e-4


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("family", RAW_CONFIGS | WITH_TOWERS)
def test_logits(family, prompt):
    """A miss after a change of the tiny models: run python tests/golden/families/regenerate.py."""
    with np.load(pathlib.Path(__file__).parent / f"{family}.npz") as kept:
        token_ids, theirs = kept[f"prompt{prompt}"], kept[f"logits{prompt}"]
    ours = np.asarray(tiny_family(family).logits(token_ids))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_logits_after_a_ragged_source(family):
    with np.load(pathlib.Path(__file__).parent / f"{family}.npz") as kept:
        ours = np.asarray(tiny_family(family).logits(kept["prompt0"], kept["source"], kept["lengths"]))
        np.testing.assert_allclose(ours, kept["logits0"], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(ours.argmax(-1), kept["logits0"].argmax(-1))
