"""The dense matrices of a model in int8: one float32 scale a row of [out, in]. Never done unless asked for (Plan.dense_dtype)."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.packing.kinds.int8 import LARGEST, codes
from specmoe_jax.models.spec import DTYPE_BYTES, TensorSpec, Weights, is_spec
from specmoe_jax.ops.dense import PackedMatrix

# Fields of the weights (models/spec.py) that only ever meet `basics.linear` or `layers.output`. Routers, what chooses
# positions, and kv_b, which latent attention absorbs, stay as they are.
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "q_a", "kv_a", "z", "lm_head"})
KEPT_WITHIN = "indexer"


def pack_dense(weights: Weights[jax.Array]) -> Weights[jax.Array]:
    """The weights with their matrices packed, one at a time; a tied output matrix becomes a packed copy of the embedding."""

    def pack(path, leaf: jax.Array) -> jax.Array | PackedMatrix:
        return _packed(leaf) if _is_matrix(path) else leaf

    packed = jax.tree_util.tree_map_with_path(pack, weights)
    return packed if weights.lm_head is not None else packed.replace(lm_head=_packed(weights.embed))


def is_packed(weights: Weights[jax.Array]) -> bool:
    return isinstance(weights.lm_head, PackedMatrix)


def weight_bytes(config: ModelConfig, dtype: str, dense_dtype: str | None) -> int:
    """Of everything but the experts, under Plan.dtype and Plan.dense_dtype."""
    specs = family_of(config).weight_specs(config)
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]
    if dense_dtype is None:
        return sum(spec.bytes(dtype) for _, spec in leaves)
    tied = _packed_bytes(specs.embed) if specs.lm_head is None else 0
    return tied + sum(_packed_bytes(spec) if _is_matrix(path) else spec.bytes(dtype) for path, spec in leaves)


def dense_itemsize(dtype: str, dense_dtype: str | None) -> int:
    """Bytes of a number of a dense matrix."""
    return DTYPE_BYTES[dtype] if dense_dtype is None else 1


def _is_matrix(path) -> bool:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] in MATRICES and KEPT_WITHIN not in names


def _packed_bytes(spec: TensorSpec) -> int:
    return spec.size + 4 * spec.shape[0]


def _packed(matrix: jax.Array) -> PackedMatrix:
    exact = np.asarray(matrix, np.float32)
    scales = np.abs(exact).max(axis=1) / np.float32(LARGEST)
    return PackedMatrix(jnp.asarray(codes(exact, scales[:, None], LARGEST)), jnp.asarray(scales))
