"""Scaled rotary frequencies by hand; tests/parity compares them with transformers."""

import math

import pytest

from specmoe_jax.config.layer_config import Rope
from specmoe_jax.models.rope import read_rope
from specmoe_jax.support.errors import CheckpointError

SCOUT = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def rope(**changes) -> Rope:
    raw = {"rope_theta": 5e5, "rope_scaling": SCOUT | changes, "max_position_embeddings": 10485760}
    return read_rope(raw, 128, default_theta=1e4)


def test_equal_factors_are_a_step():
    """Llama-4-Scout: of 64 pairs the 29 whose wave is longer than the original window are divided, the others kept."""
    plain, scaled = Rope.plain(5e5, 128).frequencies, rope().frequencies
    expected = [f / 16 if 2 * math.pi / f > 8192 else f for f in plain]
    assert scaled == pytest.approx(expected, rel=1e-12)
    assert sum(a != b for a, b in zip(scaled, plain, strict=True)) == 29


def test_factors_in_the_wrong_order_are_refused():
    with pytest.raises(CheckpointError, match=r"low_freq_factor is 2.0; it must be at most high_freq_factor, 1.0"):
        rope(low_freq_factor=2.0)
