"""Packed experts decoded by the kernel: against float64 of exactly what the bytes stand for, and independent of batch mates."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from specmoe_jax import ops
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models import packing
from specmoe_jax.models.experts import block_function, expert_ffn
from specmoe_jax.models.packing.random import random_expert
from tests.ops.test_experts import ffn64

SHAPES = {
    "one_token": (1, 2, 4, 64, 32),
    "odd": (9, 2, 5, 200, 77),
    "tiny": (3, 1, 1, 3, 1),
    "two_model_blocks": (7, 2, 3, 1030, 300),
    "many_rows": (70, 2, 3, 48, 40),
    "many_hidden": (5, 1, 2, 40, 2300),
}


def config_of(kind, M, F) -> ExpertConfig:
    return ExpertConfig(model=M, hidden=F, packing=kind)


def make(seed, kind, n, A, R, M, F, x_dtype=jnp.float32):
    """x, packed blocks [R, bytes], slots, and the blocks that the bytes stand for."""
    config, rng = config_of(kind, M, F), np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, M)), x_dtype)
    weights = (rng.normal(size=(R, 3, F, M)) / np.sqrt(M)).astype(np.float32)
    blocks = np.stack([packing.pack(config, block) for block in weights])
    exact = np.stack([np.asarray(packing.unpack(config, jnp.asarray(block))) for block in blocks])
    return config, (x, jnp.asarray(blocks), jnp.asarray(rng.integers(-1, R, size=(n, A)), jnp.int32)), exact


PUBLISHED = [
    "fp8:128x128", "fp8:64x32", "fp8_rows:channel", "fp8_rows:tensor", "mxfp4", "awq:32", "compressed:32:bfloat16", "nvfp4",
]  # fmt: skip
# More than a register's.
GROUPS = ["awq:64", "awq:128", "gptq:128", "compressed:64:float16", "compressed:128:bfloat16"]
CLAMPED = {"activation": "clamped_swiglu", "biased": True, "alpha": 1.702, "limit": 2.0}
ROW_SHAPES = {"one_token": (1, 2, 4, 64, 32), "several": (9, 2, 5, 224, 96), "rows": (40, 2, 3, 160, 64)}


def make_published(seed, packing, n, A, R, M, F, x_dtype=jnp.float32, **expert):
    config, rng = ExpertConfig(model=M, hidden=F, packing=packing, **expert), np.random.default_rng(seed)
    blocks = jnp.asarray(np.stack([random_expert(config, rng) for _ in range(R)]))
    x = jnp.asarray(rng.normal(size=(n, M)), x_dtype)
    return config, (x, blocks, jnp.asarray(rng.integers(-1, R, size=(n, A)), jnp.int32))


def rounding(form):
    """Of a product, in magnitudes of its terms. Codes of 4 bits meet integers of 16, which the kernel rounds x to."""
    return 2.0**-18 if form.split(":")[0] in ("int4", "awq", "gptq", "compressed", "mxfp4", "nvfp4") else 8 * 2.0**-24


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_lossless_gives_the_bits_of_the_bfloat16_kernel(isa, name, x_dtype):
    n, A, R, M, F = SHAPES[name]
    config, rng = config_of("lossless", M, F), np.random.default_rng(4)
    weights = (rng.normal(size=(R, 3, F, M)) / np.sqrt(M)).astype(ml_dtypes.bfloat16)
    weights[rng.random(weights.shape) < 0.001] *= 1e-9  # the exceptions
    blocks = jnp.asarray(np.stack([packing.pack(config, block.view(np.uint16)) for block in weights]))
    x, slots = jnp.asarray(rng.normal(size=(n, M)), x_dtype), jnp.asarray(rng.integers(-1, R, size=(n, A)), jnp.int32)
    expected = ops.expert_ffn(x, jnp.asarray(weights.view(np.uint16)), slots, hidden=F)
    lowered = jax.jit(lambda *a: expert_ffn(config, *a)).lower(x, blocks, slots)
    assert "specmoe_packed_expert_ffn" in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()(x, blocks, slots), expected)


@pytest.mark.parametrize(
    ("form", "shape"),
    [*itertools.product(PUBLISHED, ROW_SHAPES.values()), *itertools.product(GROUPS, [(9, 2, 5, 256, 128), (2, 1, 2, 640, 384)])],
)
def test_published_forms_agree_with_float64_on_exact_decoding(isa, form, shape):
    config, (x, blocks, slots) = make_published(1, form, *shape)
    exact = np.stack([packing.unpacked(config, np.asarray(block)) for block in blocks])
    want, bound = ffn64(x, jnp.asarray(exact), slots)
    got = jax.jit(lambda *a: expert_ffn(config, *a))(x, blocks, slots)
    assert np.all(np.abs(np.asarray(got) - want) <= rounding(form) * bound)


@pytest.mark.parametrize("packing", PUBLISHED)
def test_published_forms_with_biases_and_clamps(isa, packing):
    config, args = make_published(2, packing, *ROW_SHAPES["several"], **CLAMPED)
    lowered = jax.jit(lambda *a: expert_ffn(config, *a)).lower(*args)
    assert "specmoe_rowwise_expert_ffn" in lowered.as_text()
    want = ops.expert_ffn_ref(*args, ffn=block_function(config))
    assert jnp.abs(lowered.compile()(*args) - want).max() <= 64 * rounding(packing) * jnp.abs(want).max()


@pytest.mark.parametrize("packing", PUBLISHED)
def test_a_pair_of_a_published_form_depends_on_itself_alone(isa, monkeypatch, packing):
    config, (x, blocks, slots) = make_published(3, packing, *ROW_SHAPES["rows"], jnp.bfloat16)
    y = expert_ffn(config, x, blocks, slots)
    for n in (1, 2, 7):
        np.testing.assert_array_equal(expert_ffn(config, x[11 : 11 + n], blocks, slots[11 : 11 + n]), y[11 : 11 + n])
    monkeypatch.setenv("SPECMOE_THREADS", "1")
    np.testing.assert_array_equal(jax.jit(lambda *a: expert_ffn(config, *a))(x, blocks, slots), y)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_agrees_with_float64_on_exact_decoding(isa, name, kind):
    config, (x, blocks, slots), exact = make(1, kind, *SHAPES[name])
    want, bound = ffn64(x, jnp.asarray(exact), slots)
    got = jax.jit(lambda *a: expert_ffn(config, *a))(x, blocks, slots)
    assert np.all(np.abs(np.asarray(got) - want) <= rounding(kind) * bound)
    reference = ops.expert_ffn_ref(x, blocks, slots, ffn=block_function(config))
    assert np.all(np.abs(np.asarray(reference) - want) <= 8 * 2.0**-24 * bound)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_kernel_is_what_runs(kernels, kind):
    config, args, _ = make(2, kind, *SHAPES["odd"])
    assert "specmoe_packed_expert_ffn" in jax.jit(lambda *a: expert_ffn(config, *a)).lower(*args).as_text()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_pair_depends_on_itself_alone(isa, monkeypatch, kind):
    config, (x, blocks, slots), _ = make(3, kind, 40, 2, 3, 136, 90, jnp.bfloat16)
    y = expert_ffn(config, x, blocks, slots)
    for n in (1, 2, 7):
        for i in (0, 11):
            np.testing.assert_array_equal(expert_ffn(config, x[i : i + n], blocks, slots[i : i + n]), y[i : i + n])
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(expert_ffn(config, x[order], blocks, slots[order]), y[order])
    monkeypatch.setenv("SPECMOE_THREADS", "1")
    np.testing.assert_array_equal(jax.jit(lambda *a: expert_ffn(config, *a))(x, blocks, slots), y)


def test_packing_needs_what_unpacks():
    _, (x, blocks, slots), _ = make(4, "int8", *SHAPES["odd"])
    with pytest.raises(ValueError, match="packing needs ffn and hidden"):
        ops.expert_ffn(x, blocks, slots, packing="int8")
