"""Cosines are computed once for all heads, not in each place that reads them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.config.layer_config import Rope
from specmoe_jax.models import basics
from specmoe_jax.models.basics import computed_once, rope

FREQUENCIES = Rope.plain(1e4, 16)


def rotated(q, k, positions):
    return rope((q, k), positions, FREQUENCIES)


def arrays(rows: int, new: int):
    rng = np.random.default_rng(3)
    q, k = (rng.standard_normal((rows, new, heads, 16)).astype(np.float32) for heads in (6, 2))
    return q, k, np.arange(rows * new, dtype=np.int32).reshape(rows, new)


def compiled(given) -> str:
    return jax.jit(lambda *given: rotated(*given)).lower(*given).compile().as_text()


@pytest.mark.parametrize("rows, new", [(1, 128), (64, 2), (130, 1)])
def test_one_computation_serves_all_heads(rows, new):
    assert len(re.findall(r" cosine\(", compiled(arrays(rows, new)))) == 1


def test_few_positions_are_left_to_the_fusions():
    assert "conditional" not in compiled(arrays(3, 1))


def test_the_same_rotation(monkeypatch):
    given = arrays(64, 2)
    once = jax.jit(lambda *given: rotated(*given))(*given)
    monkeypatch.setattr(basics, "FEW_RESULTS", 10**9)
    plain = jax.jit(lambda *given: rotated(*given))(*given)
    for ours, theirs in zip(once, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_gradients_and_maps_pass():
    x = jnp.linspace(0.1, 2.0, 2048)

    def total(x):
        return jnp.sum(computed_once(jnp.sin, x) * jnp.arange(2048.0))

    np.testing.assert_allclose(jax.grad(total)(x), jnp.cos(x) * jnp.arange(2048.0), rtol=1e-6, atol=1e-6)
    both = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(lambda x: computed_once(jnp.sin, x))(both), jnp.sin(both), rtol=1e-6, atol=1e-6)
