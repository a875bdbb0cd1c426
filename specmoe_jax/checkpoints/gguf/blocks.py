"""Values of GGUF tensors: their blocks decoded as the `gguf` package does, and what its converter did to rows undone."""

import numpy as np

from specmoe_jax.checkpoints.files import Form, Reader, StoredTensor
from specmoe_jax.support.errors import CheckpointError, RequestError


def values(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """float32 [count] of a tensor in Hugging Face's layout, from element `first` on, which begins a row. Raises CheckpointError.

    A tensor whose rows are in another order, or that is made of two, is read whole.
    """
    form = tensor.form
    assert form is not None
    if form.halves:
        return _joined(*form.halves).reshape(-1)[first : first + count]
    if not form.heads:
        return _decoded(tensor, first, count)
    return _halves_together(_decoded(tensor, 0, tensor.entry.size), tensor, form)[first : first + count]


def raw_bytes(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """The blocks of so many values."""
    size, total = tensor.entry.size, tensor.entry.bytes
    blocks = np.empty(count * total // size, np.uint8)
    with Reader(tensor) as reader:
        reader.read_into(blocks, first * total // size)
    return blocks


def _decoded(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    try:
        import gguf
    except ImportError:
        raise RequestError(f"{tensor.path.name}: decoding needs the gguf package: pip install specmoe_jax[gguf]") from None
    row = tensor.entry.shape[-1]
    blocks = raw_bytes(tensor, first, count).reshape(count // row, -1)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are reported by the check for finite weights
            return (
                gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[tensor.entry.dtype])
                .astype(np.float32, copy=False)
                .reshape(-1)
            )
    except (NotImplementedError, ValueError, KeyError) as e:
        raise CheckpointError(f"{tensor.where}: {tensor.entry.dtype} cannot be decoded ({e})") from e


def _halves_together(matrix: np.ndarray, tensor: StoredTensor, form: Form) -> np.ndarray:
    """llama.cpp keeps the two halves of each head interleaved, since it rotates neighbours; Hugging Face rotates halves."""
    rows = tensor.entry.shape[0]
    if rows % (2 * form.heads):
        raise CheckpointError(f"{tensor.where}: {rows} rows; expected a multiple of twice its {form.heads} heads")
    return np.ascontiguousarray(matrix.reshape(form.heads, rows // form.heads // 2, 2, -1).swapaxes(1, 2)).reshape(-1)


def _joined(key: StoredTensor, value: StoredTensor) -> np.ndarray:
    """kv_b_proj [H * (nope + value), rank] of keys [H, rank, nope] and values [H, value, rank]."""
    keys, rest = (_decoded(half, 0, half.entry.size).reshape(half.entry.shape) for half in (key, value))
    return np.concatenate([keys.swapaxes(1, 2), rest], axis=1)
