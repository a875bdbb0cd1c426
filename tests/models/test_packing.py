"""Packed experts: every weight within half a step of its scale, the bytes as announced, biases exact."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing import kind_of, pack, packed_bytes, unpack, unpacked
from specmoe_jax.models.packing.kinds import int4, int8
from specmoe_jax.models.packing.kinds.int4 import GROUP
from specmoe_jax.support.errors import CheckpointError


def configs(*packings: str):
    return st.builds(
        ExpertConfig,
        hidden=st.integers(1, 9),
        model=st.sampled_from([1, 5, 32, 40, 64]),
        activation=st.sampled_from(["swiglu", "relu"]),
        biased=st.booleans(),
        packing=st.sampled_from(packings),
    )


def steps(config: ExpertConfig, core: np.ndarray) -> np.ndarray:
    """The scale that each weight has, from the definition."""
    if config.packing == "int8":
        rows = np.broadcast_to(np.abs(core[:-1]).max(axis=2, keepdims=True), core[:-1].shape)
        return np.concatenate([rows, np.broadcast_to(np.abs(core[-1:]).max(axis=1, keepdims=True), core[-1:].shape)]) / int8.LARGEST
    columns = [
        np.broadcast_to(np.abs(part).max(axis=2, keepdims=True), part.shape)
        for part in np.split(core, range(GROUP, core.shape[2], GROUP), axis=2)
    ]
    return np.concatenate(columns, axis=2) / int4.LARGEST


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(config=configs("int8", "int4"), seed=st.integers(0, 1 << 30), half=st.booleans())
def test_round_trip(config, seed, half):
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(config.block_shape).astype(np.float32) * np.exp(rng.uniform(-8, 8))
    block[rng.random(block.shape) < 0.2] = 0
    if config.biased:
        block[:-1, -1], block[-1, :-1, -1], block[:, -1, -1] = 0, 0, 0  # what a border does not hold
    block = block.astype(ml_dtypes.bfloat16) if half else block
    packed = pack(config, block.view(np.uint16) if half else block)
    assert packed.dtype == np.uint8 and packed.shape == (packed_bytes(config),)
    block, back = block.astype(np.float32), np.asarray(unpack(config, packed))
    np.testing.assert_array_equal(unpacked(config, packed), back)
    core = np.s_[:, : config.hidden, : config.model]
    rounding = 1.01 if config.packing == "int8" else 1.01 + int4.LARGEST / 64  # of a bfloat16 scale, at the largest codes
    assert (np.abs(back - block)[core] <= rounding * steps(config, block[core]) / 2).all()
    outside = np.ones(block.shape, bool)
    outside[core] = False
    np.testing.assert_array_equal(back[outside], block[outside])


@settings(max_examples=25, deadline=None)
@given(config=configs("lossless"), seed=st.integers(0, 1 << 30), half=st.booleans())
def test_lossless_gives_the_bits_back(config, seed, half):
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(config.block_shape) * np.exp(rng.uniform(-80, 80))).astype(np.float32)
    block[:, rng.integers(block.shape[1])] = -0.0  # a row
    for value in (0.0, -0.0, 1e-40, -3e-39):
        block[tuple(rng.integers(block.shape))] = value
    if config.biased:
        block[:-1, -1], block[-1, :-1, -1], block[:, -1, -1] = 0, 0, 0  # what a border does not hold
    block = block.astype(ml_dtypes.bfloat16)
    packed = pack(config, block.view(np.uint16) if half else block.astype(np.float32))
    assert packed.dtype == np.uint8 and packed.shape == (packed_bytes(config),)
    for back in (unpacked(config, packed), np.asarray(unpack(config, packed))):
        np.testing.assert_array_equal(back.astype(np.float32).view(np.uint32), block.astype(np.float32).view(np.uint32))


def test_lossless_takes_three_quarters_and_an_exception_in_512_weights():
    config = ExpertConfig(hidden=1408, model=2048, packing="lossless")
    weights, exceptions = 3 * 1408 * 2048, 64 + 3 * 1408 * 2048 // 512
    assert packed_bytes(config) == 1.5 * weights + 6 * exceptions + 3 * 1408


def test_lossless_refuses_what_it_would_change():
    config = ExpertConfig(hidden=4, model=64, packing="lossless")
    block = np.full(config.block_shape, 1 / 3, np.float32)
    with pytest.raises(CheckpointError, match="from bfloat16 alone, these are float32; leave the packing out"):
        pack(config, block)
    spread = np.ones(config.block_shape, np.float32)
    spread[:, :, 1:] = 2.0**-20
    with pytest.raises(CheckpointError, match=r"756 of an expert's 768 weights are too small .* at most 65 may be"):
        pack(config, spread)


@pytest.mark.parametrize("packing", ["zebra", "fp8", "fp8:128", "awq:many"])
def test_an_unknown_kind_is_refused(packing):
    with pytest.raises(CheckpointError, match=f"experts are packed as '{packing}'"):
        kind_of(packing)


def test_sizes():
    """V2-Lite's experts: 4 times smaller than float32 in int8; 4.5 bits a weight in int4."""
    config = ExpertConfig(hidden=1408, model=2048)
    weights = 3 * 1408 * 2048
    assert packed_bytes(ExpertConfig(hidden=1408, model=2048, packing="int8")) == weights + 4 * (2 * 1408 + 2048)
    assert packed_bytes(ExpertConfig(hidden=1408, model=2048, packing="int4")) * 8 == 4.5 * config.params
