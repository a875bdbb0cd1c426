"""One description per tensor: names, shapes, bytes, random test weights and the loader's target derive from it."""

import math
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import struct

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class TensorSpec(NamedTuple):
    """A tensor as it stands in a checkpoint and in memory (same layout: [out, in] for matrices)."""

    name: str
    shape: tuple[int, ...]
    init: str = "normal"  # or "ones": what random test weights hold

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class ExpertSpec(NamedTuple):
    """The three matrices of one expert. In memory they are one contiguous block [3, F, M]: gate, up, down transposed.

    One block is one copy over the link, and each row of it is one hidden unit: a unit's gate, up and down
    weights all have length M, so the kernel streams rows whichever product it computes.
    """

    gate: TensorSpec  # [F, M]
    up: TensorSpec  # [F, M]
    down: TensorSpec  # [M, F] in the checkpoint, transposed in the block

    @property
    def block_shape(self) -> tuple[int, int, int]:
        return (3, *self.gate.shape)


@struct.dataclass
class LayerWeights:
    """Everything of one decoder layer but its experts. Leaves are TensorSpecs or arrays of those shapes."""

    input_norm: TensorSpec | jax.Array  # [M]
    q: TensorSpec | jax.Array  # [H * D, M]
    k: TensorSpec | jax.Array  # [K * D, M]
    v: TensorSpec | jax.Array  # [K * D, M]
    o: TensorSpec | jax.Array  # [M, H * D]
    post_norm: TensorSpec | jax.Array  # [M]
    router: TensorSpec | jax.Array  # [E, M]


@struct.dataclass
class Weights:
    """Everything of a model but its experts: what always lives on the accelerator."""

    embed: TensorSpec | jax.Array  # [V, M]
    layers: tuple[LayerWeights, ...]
    final_norm: TensorSpec | jax.Array  # [M]
    lm_head: TensorSpec | jax.Array | None  # [V, M]; None: tied to embed


def is_spec(leaf) -> bool:
    """For jax.tree functions: a TensorSpec is a tuple, so it must be named as a leaf."""
    return isinstance(leaf, TensorSpec)


def spec_leaves(specs) -> list[TensorSpec]:
    """All TensorSpecs of a tree, in order."""
    return jax.tree.leaves(specs, is_leaf=is_spec)


def map_specs(function, specs):
    """The tree with `function(spec)` in the place of each spec."""
    return jax.tree.map(function, specs, is_leaf=is_spec)


def random_tensor(spec: TensorSpec, seed: int) -> np.ndarray:
    """float32 test weights of a spec: the same for the same seed and name, whatever else is drawn."""
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    rng = np.random.default_rng([seed, *spec.name.encode()])
    scale = 1.0 / math.sqrt(spec.shape[-1])
    return rng.standard_normal(spec.shape, np.float32) * np.float32(scale)


def expert_block(gate: np.ndarray, up: np.ndarray, down: np.ndarray, dtype: str) -> np.ndarray:
    """The block [3, F, M] of an expert from its matrices in checkpoint layout.

    bfloat16 blocks are stored as uint16 bits: XLA:CPU converts the whole buffer to float32 and back on every
    slot write of a bfloat16 array (1.33 ms against 0.13 ms for 1 MB), and a copy does not care.
    """
    block = np.empty((3, *gate.shape), np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    block[0], block[1], block[2] = gate, up, down.T
    return block if dtype == "float32" else block.view(np.uint16)
