"""The reference forward: what it compiles."""

import numpy as np

from specmoe_jax.testing.families import tiny_family

PROGRAMS = {"embedding", "attention of a dense layer", "attention of a layer with experts", "an expert", "the chosen", "head"}


def test_layers_alike_are_one_program(compilations):
    """Of six layers of two kinds that take turns; up to two more copy to the accelerator, unless a test before has made them."""
    model, token_ids = tiny_family("qwen3_moe"), np.ones((1, 29), np.int32)
    before = compilations.count
    model.logits(token_ids)
    first = compilations.count - before
    assert len(PROGRAMS) <= first <= len(PROGRAMS) + 2
    model.logits(token_ids + 1)
    assert compilations.count - before == first
