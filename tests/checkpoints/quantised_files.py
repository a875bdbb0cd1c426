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


def fp8_rows(*, per_row: bool):
    def quantise(name: str, matrix: np.ndarray):
        scales = np.zeros((matrix.shape[0] if per_row else 1, 1), ml_dtypes.bfloat16 if per_row else np.float32)
        codes, exact = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn), np.zeros_like(matrix)
        for i, row in enumerate(matrix):
            place = (i if per_row else 0, 0)
            scales[place] = np.abs(row if per_row else matrix).max() / 400
            codes[i] = (row / np.float32(scales[place])).astype(codes.dtype)
            exact[i] = codes[i].astype(np.float32) * np.float32(scales[place])
        return {name: codes, f"{name}_scale": scales if per_row else scales[0]}, exact

    return quantise


def _codes(matrix: np.ndarray, group: int, scale_dtype, middle=None):
    """(codes [out, in], scales and zeros [out, groups], what they stand for), all as numbers."""
    rows, columns = matrix.shape
    codes, exact = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.float32)
    scales, zeros = np.zeros((rows, columns // group), scale_dtype), np.zeros((rows, columns // group), np.int64)
    for i, g in np.ndindex(scales.shape):
        part = matrix[i, g * group : (g + 1) * group]
        low, high = (min(part.min(), 0), max(part.max(), 0)) if middle is None else (-abs(part).max(), abs(part).max())
        scales[i, g] = (high - low) / 15 or 1
        scale = np.float32(scales[i, g])
        zeros[i, g] = min(14, round(-low / scale)) if middle is None else middle
        for j, weight in enumerate(part, g * group):
            codes[i, j] = min(15, max(0, round(weight / scale) + zeros[i, g]))
            exact[i, j] = np.float32(codes[i, j] - zeros[i, g]) * scale
    return codes, scales, zeros, exact


def _words(codes: np.ndarray, order=range(8)) -> np.ndarray:
    """int32 [..., n / 8]: nibble k of a word is the code at place order[k] of its eight."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.int64)
    for k, place in enumerate(order):
        words += codes[..., place::8] << 4 * k
    return words.astype(np.uint32).view(np.int32)


def awq(group: int):
    def quantise(name: str, matrix: np.ndarray):
        module, order = name.removesuffix(".weight"), (0, 2, 4, 6, 1, 3, 5, 7)
        codes, scales, zeros, exact = _codes(matrix, group, np.float16)
        packed = {"qweight": _words(codes.T, order), "qzeros": _words(zeros.T, order), "scales": scales.T}
        return {f"{module}.{part}": tensor for part, tensor in packed.items()}, exact

    return quantise


def gptq(group: int, *, less: int = 1):
    def quantise(name: str, matrix: np.ndarray):
        module = name.removesuffix(".weight")
        codes, scales, zeros, exact = _codes(matrix, group, np.float16, middle=None if less == 0 else 8)
        packed = {"qweight": _words(codes).T, "qzeros": _words(zeros.T - less), "scales": scales.T}
        packed["g_idx"] = (np.arange(matrix.shape[1]) // group).astype(np.int32)
        return {f"{module}.{part}": tensor for part, tensor in packed.items()}, exact

    return quantise


def compressed(group: int, *, zeros: bool):
    def quantise(name: str, matrix: np.ndarray):
        module = name.removesuffix(".weight")
        codes, scales, middles, exact = _codes(matrix, group, ml_dtypes.bfloat16, middle=None if zeros else 8)
        packed = {"weight_packed": _words(codes), "weight_scale": scales, "weight_shape": np.array(matrix.shape, np.int64)}
        if zeros:
            packed["weight_zero_point"] = _words(middles.T).T
        return {f"{module}.{part}": tensor for part, tensor in packed.items()}, exact

    return quantise


def nvfp4(name: str, matrix: np.ndarray):
    module, groups = name.removesuffix(".weight"), matrix.shape[1] // 16
    scale = np.float32(abs(matrix).max() / 6 / 448)
    scales = (abs(matrix).reshape(-1, groups, 16).max(axis=2) / 6 / scale).astype(ml_dtypes.float8_e4m3fn)
    codes, exact = np.zeros(matrix.shape, np.int64), np.zeros_like(matrix)
    for i, j in np.ndindex(matrix.shape):
        step = np.float32(scales[i, j // 16]) * scale
        codes[i, j] = abs(E2M1 - abs(matrix[i, j]) / step).argmin() + 8 * (matrix[i, j] < 0)
        exact[i, j] = E2M1[codes[i, j] % 8] * (-1 if codes[i, j] > 7 else 1) * step
    packed = {"weight": (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8), "weight_scale": scales}
    packed |= {"weight_scale_2": scale.reshape(()), "input_scale": np.ones((), np.float32)}
    return {f"{module}.{part}": tensor for part, tensor in packed.items()}, exact


def quantised(family: str, quantise, raw: dict | None = None) -> tuple[dict, dict]:
    """(tensors as published, the same checkpoint with its weights as they decode), of a tiny model of the family."""
    return quantise_all(stored_tensors(random_model(parse_config(raw or RAW_CONFIGS[family])), 0), quantise)


def quantise_all(tensors: dict, quantise) -> tuple[dict, dict]:
    """As `quantised`, of these tensors."""
    packed, exact = {}, {}
    for name, tensor in tensors.items():
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
