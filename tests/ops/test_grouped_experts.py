"""Grouped products over slots, interpreted on the CPU, against every expert on every token; and how pairs become visits."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.ops.pallas import grouped_experts
from specmoe_jax.ops.reference.experts import expert_ffn_ref
from specmoe_jax.support.errors import UserError

SIZES = {"cuda": (64, 128), "tpu": (128, 128)}


def case(platform: str, n: int, R: int, dtype=jnp.uint16):
    F, M = SIZES[platform]
    rng = np.random.default_rng(n)
    blocks = jnp.asarray(rng.standard_normal((R, 3, F, M)) / M**0.5, jnp.bfloat16)
    x, slots = rng.standard_normal((n, M)), rng.integers(-1, R + 1, (n, 2))  # -1 and R: no expert
    return jnp.asarray(x, jnp.float32), jax.lax.bitcast_convert_type(blocks, dtype), jnp.asarray(slots, jnp.int32)


@pytest.mark.every_case
@pytest.mark.parametrize("platform", SIZES)
def test_outputs_are_those_of_every_expert_on_every_token(platform):
    x, blocks, slots = case(platform, 21, 5)  # 42 pairs: blocks of 16 rows in which several slots meet
    kernel = importlib.import_module(grouped_experts.KERNELS[platform].module).experts
    got, want = kernel(x, blocks, slots, interpret=True), expert_ffn_ref(x, blocks, slots)
    assert (np.asarray(got)[np.asarray((slots < 0) | (slots == 5))] == 0).all()
    np.testing.assert_allclose(got, want, atol=0.006 * float(jnp.abs(want).max()))  # x and hidden units are rounded to bfloat16


def visits_of(slots, R: int, rows: int):
    visits = [np.asarray(v) for v in grouped_experts.visits(jnp.asarray(np.sort(slots), jnp.int32), R, rows)]
    return list(zip(*(v.tolist() for v in visits), strict=True))


def test_every_row_of_a_slot_is_in_exactly_one_visit():
    rng = np.random.default_rng(0)
    for P, R, rows in ((1, 3, 16), (40, 5, 16), (100, 2, 32), (64, 200, 16)):
        ordered = np.sort(rng.integers(0, R + 1, P))  # R: without an expert
        seen = np.zeros(P, int)
        for slot, block, low, high, _ in visits_of(ordered, R, rows):
            own = np.arange(block * rows + low, block * rows + high)
            assert (ordered[own] == slot).all()
            seen[own] += 1
        assert (seen == (ordered < R)).all()


def test_a_block_is_begun_once_and_what_comes_after_the_last_visit_repeats_it():
    found = visits_of([0, 0, 1, 3, 3, 3, 3, 4], 5, 4)
    assert [(slot, block) for slot, block, *_ in found] == [(0, 0), (1, 0), (3, 0), (3, 1), (4, 1), (4, 1)]
    assert [first for *_, first in found] == [1, 0, 0, 1, 0, 0]
    assert found[-1][2] == found[-1][3]  # no rows


def test_without_any_expert_nothing_is_visited():
    assert all(low >= high for _, _, low, high, _ in visits_of([3, 3], 3, 16))


def test_a_cpu_has_none_of_them(monkeypatch):
    x, blocks, slots = case("tpu", 2, 3)
    assert not any(grouped_experts.fits(platform, x, blocks, slots) for platform in SIZES)
    monkeypatch.setenv("SPECMOE_GROUPED", "tpu")
    assert grouped_experts.fits("tpu", x, blocks, slots) and not grouped_experts.fits("cuda", x, blocks, slots)
    assert not grouped_experts.fits("tpu", x, blocks.astype(jnp.float32), slots)  # float32 keeps XLA's products
    assert not grouped_experts.fits("tpu", x, blocks[:, :, :64], slots)  # half a tile
    np.testing.assert_array_equal(ops.expert_ffn(x, blocks, slots), jax.jit(ops.expert_ffn)(x, blocks, slots))


def test_an_unknown_platform_is_an_error(monkeypatch):
    monkeypatch.setenv("SPECMOE_GROUPED", "abacus")
    with pytest.raises(UserError, match="SPECMOE_GROUPED is 'abacus'; it must be one of cuda, tpu, none"):
        grouped_experts.fits("tpu", *case("tpu", 2, 3))
