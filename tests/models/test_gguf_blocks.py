"""Blocks of GGUF types decode bit for bit as the `gguf` package decodes them, in numpy and compiled by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.models.packing.kinds.gguf import TYPES

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", ["Q4_K", *(name for name in TYPES if name != "Q4_K")])
def test_decoding_is_bit_equal(name):
    """Random bytes under scales from subnormal to large ones of either sign."""
    kind, quant, rng = TYPES[name], gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    assert gguf.GGML_QUANT_SIZES[quant] == (kind.values, kind.bytes)
    blocks = rng.integers(0, 256, (16, 5, kind.bytes), np.uint8)
    for at in kind.scales:
        scales = (rng.standard_normal((16, 5)) * 10.0 ** rng.integers(-8, 3, (16, 5))).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8).reshape(16, 5, 2)
    if kind.exponent is not None:
        blocks[..., kind.exponent] = rng.integers(3, 253, (16, 5))
    want = gguf.quants.dequantize(blocks.reshape(16, -1), quant).view(np.uint32)
    for decoded in (kind.decode(blocks, np), jax.jit(lambda raw: kind.decode(raw, jnp))(blocks)):
        np.testing.assert_array_equal(np.asarray(decoded).reshape(16, -1).view(np.uint32), want)
