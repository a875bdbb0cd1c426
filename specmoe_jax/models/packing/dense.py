"""The dense matrices of a model in int8 or int4. Never done unless asked for (Plan.dense_dtype)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.packing.kinds import int4, int8
from specmoe_jax.models.spec import DTYPE_BYTES, TensorSpec, Weights, is_spec
from specmoe_jax.ops.dense import PackedMatrix

# Fields of the weights (models/spec.py) that only ever meet `basics.linear` or `layers.output`. Routers, what chooses
# positions, and kv_b, which latent attention absorbs, stay as they are.
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "q_a", "kv_a", "z", "lm_head"})
KEPT_WITHIN = "indexer"


class DenseKind(NamedTuple):
    """A way to pack a matrix [out, in]."""

    itemsize: float  # bytes of a number, but for what a row has besides
    row_bytes: Callable[[int], int]  # of a row of so many numbers
    pack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # float32 -> codes and scales of ops.PackedMatrix


def _int8_rows(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(exact).max(axis=1) / np.float32(int8.LARGEST)
    return int8.codes(exact, scales[:, None], int8.LARGEST), scales


# int8: one float32 scale a row. int4: one bfloat16 scale to each 32 neighbours of a row, which ends with a whole group.
KINDS: Mapping[str, DenseKind] = {
    "int8": DenseKind(1, lambda columns: columns + 4, _int8_rows),
    "int4": DenseKind(18 / 32, lambda columns: -(-columns // int4.GROUP) * 18, int4.encode_rows),
}


def pack_dense(weights: Weights[jax.Array], dense_dtype: str) -> Weights[jax.Array]:
    """The weights with their matrices packed, one at a time; a tied output matrix becomes a packed copy of the embedding."""

    def packed(matrix: jax.Array) -> PackedMatrix:
        codes, scales = KINDS[dense_dtype].pack(np.asarray(matrix, np.float32))
        return PackedMatrix(jnp.asarray(codes), jnp.asarray(scales))

    def pack(path, leaf: jax.Array) -> jax.Array | PackedMatrix:
        return packed(leaf) if _is_matrix(path) else leaf

    result = jax.tree_util.tree_map_with_path(pack, weights)
    return result if weights.lm_head is not None else result.replace(lm_head=packed(weights.embed))


def packed_as(weights: Weights[jax.Array]) -> str | None:
    """The dense_dtype of these weights."""
    if not isinstance(weights.lm_head, PackedMatrix):
        return None
    return "int4" if weights.lm_head.in_groups else "int8"


def weight_bytes(config: ModelConfig, dtype: str, dense_dtype: str | None) -> int:
    """Of everything but the experts, under Plan.dtype and Plan.dense_dtype."""
    specs = family_of(config).weight_specs(config)
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]
    if dense_dtype is None:
        return sum(spec.bytes(dtype) for _, spec in leaves)

    def packed(spec: TensorSpec) -> int:
        return spec.shape[0] * KINDS[dense_dtype].row_bytes(spec.size // spec.shape[0])

    tied = packed(specs.embed) if specs.lm_head is None else 0
    return tied + sum(packed(spec) if _is_matrix(path) else spec.bytes(dtype) for path, spec in leaves)


def dense_itemsize(dtype: str, dense_dtype: str | None) -> float:
    """Bytes of a number of a dense matrix."""
    return DTYPE_BYTES[dtype] if dense_dtype is None else KINDS[dense_dtype].itemsize


def _is_matrix(path) -> bool:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] in MATRICES and KEPT_WITHIN not in names
