"""Checkpoints of tiny random models in the published quantised forms, and what their weights stand for by the published rule.

The rules are written slowly, weight by weight or in float64, and share nothing with the package.
"""

import ml_dtypes
import numpy as np
from family_files import stored_tensors, write

from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import random_model
from specmoe_jax.testing.families import RAW_CONFIGS

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
KEPT = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "router", "bias", "sinks", "e_score", "block_sparse_moe.gate.")


def fp8(block: tuple[int, int], scale_dtype=np.float32):
    """name, matrix -> stored tensors and what they stand for."""

    def quantise(name: str, matrix: np.ndarray):
        scales = np.zeros((-(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])), scale_dtype)
        codes, exact = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn), np.zeros_like(matrix)
        for i, j in np.ndindex(scales.shape):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(matrix[part]).max() / 448 or 1
            codes[part] = (matrix[part] / np.float32(scales[i, j])).astype(codes.dtype)
            exact[part] = codes[part].astype(np.float32) * np.float32(scales[i, j])
        return {name: codes, f"{name}_scale_inv": scales}, exact

    return quantise


def quantised(family: str, quantise, raw: dict | None = None) -> tuple[dict, dict]:
    """(tensors as published, the same checkpoint with its weights as they decode), of a tiny model of the family."""
    model = random_model(parse_config(raw or RAW_CONFIGS[family]))
    packed, exact = {}, {}
    for name, tensor in stored_tensors(model, 0).items():
        if tensor.ndim != 2 or any(part in name for part in KEPT):
            packed[name] = exact[name] = tensor.astype(ml_dtypes.bfloat16)
        else:
            stored, exact[name] = quantise(name, tensor)
            packed |= stored
    return packed, exact


def mxfp4_gpt_oss(raw: dict, seed: int = 0) -> tuple[dict, dict]:
    """As `quantised`, of codes and exponents at random."""
    rng, plain = np.random.default_rng(seed), stored_tensors(random_model(parse_config(raw)), 0)
    packed, exact = {}, {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in plain.items()}
    for name, tensor in exact.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        experts, columns, rows = tensor.shape  # stored [in, out]; packed [out, in / 32, 16]
        codes = rng.integers(0, 16, (experts, rows, columns)).astype(np.uint8)
        scales = rng.integers(119, 126, (experts, rows, columns // 32)).astype(np.uint8)
        values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
        values *= np.exp2(np.repeat(scales, 32, axis=-1).astype(np.float32) - 127)
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
        packed |= {f"{name}_blocks": blocks.reshape(experts, rows, columns // 32, 16), f"{name}_scales": scales}
        exact[name] = values.swapaxes(1, 2)
    return packed, exact


def write_pair(folder, raw: dict, form: dict, tensors: tuple[dict, dict]):
    """Both checkpoints: (quantised, decoded)."""
    return (
        write(folder / "packed", raw | {"quantization_config": form}, tensors[0]),
        write(folder / "decoded", raw, tensors[1]),
    )
