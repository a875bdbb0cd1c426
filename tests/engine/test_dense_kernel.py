"""Exactness where some passes take the compiled dense product and others XLA's: rows of a step on either side of the crossover."""

import jax
import pytest
from engine_cases import PROMPTS, plan, run

from specmoe_jax import ops
from specmoe_jax.ops.cpu import dense
from specmoe_jax.testing import tiny


@pytest.fixture(params=[1, 6, 32], ids=["steps_by_xla", "between", "all_by_kernel"])
def few_rows(request, monkeypatch):
    """The crossover at so many rows, for matrices of any size. Programs that were compiled for another crossover are dropped."""
    if not ops.isas():
        pytest.skip("the compiled kernels are not usable here")
    monkeypatch.setattr(dense, "FEW_ROWS", request.param)
    monkeypatch.setattr(dense, "CACHED", 0)
    monkeypatch.setattr(dense, "LEAST_BYTES", 0)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.slow
def test_tokens_do_not_depend_on_batch_speculation_or_crossover(few_rows):
    alone, _ = run(tiny(), plan("resident", batch_size=1), PROMPTS[:4])
    batch, _ = run(tiny(), plan("resident", batch_size=8))
    drafted, _ = run(tiny(), plan("specmoe", batch_size=2, draft_length=3))
    assert batch[:4] == alone and drafted == batch


def test_the_kernel_runs_where_it_should(few_rows):
    lowered = jax.jit(lambda x, w: ops.dense_product(x, w)).lower(jax.numpy.ones((few_rows, 8)), jax.numpy.ones((4, 8)))
    assert "specmoe_few_rows_products" in lowered.as_text()
