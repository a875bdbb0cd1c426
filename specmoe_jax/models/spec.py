"""One description per tensor: names, shapes, bytes, random test weights and the loader's target derive from it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import ml_dtypes
import numpy as np
from flax import struct

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class TensorSpec(NamedTuple):
    """A tensor as it stands in a checkpoint and in memory (same layout: [out, in] for matrices).

    An expert's matrices differ in memory: there an expert is one contiguous block, [3, F, M]: gate, up, and down
    transposed. One block is one copy over the link, and each row of it is one hidden unit: a unit's gate, up and down
    weights all have length M, so the kernel streams rows whichever product it computes.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"  # or "ones": what random test weights hold
    keep: str | None = None  # a dtype that it is kept in, whatever the compute dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def in_dtype(self, dtype: str) -> str:
        """The dtype in memory of a model that computes in `dtype`."""
        return self.keep or dtype

    def bytes(self, dtype: str) -> int:
        """In memory, of a model that computes in `dtype`."""
        return self.size * DTYPE_BYTES[self.in_dtype(dtype)]


class Part(NamedTuple):
    """A stored tensor, or one expert's entry of it, and where its values belong in the expert's block.

    index: the entry along the first axis, None for the whole tensor. view: block -> a view of it whose values, in
    order, are the stored ones: one function says both what is read and how it is laid out.
    """

    spec: TensorSpec
    view: Callable[[np.ndarray], np.ndarray]
    index: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name


Layout = tuple[Part, ...]  # all that one expert's block is filled from

Leaf = TypeVar("Leaf")  # of the weights below: a TensorSpec, or the array that it stands for


@struct.dataclass
class MlpWeights(Generic[Leaf]):
    """A dense SwiGLU network, or a ReLU network without a gate."""

    gate: Leaf | None  # [F', M]
    up: Leaf  # [F', M]
    down: Leaf  # [M, F']
    up_bias: Leaf | None = None
    down_bias: Leaf | None = None


@struct.dataclass
class CrossWeights(Generic[Leaf]):
    """Attention to what an encoder read: norm and projections, all with biases."""

    norm: Leaf  # [M]
    norm_bias: Leaf
    q: Leaf  # [H * D, M]
    q_bias: Leaf
    k: Leaf
    k_bias: Leaf
    v: Leaf
    v_bias: Leaf
    o: Leaf  # [M, H * D]
    o_bias: Leaf


@struct.dataclass
class RecurrentWeights(Generic[Leaf]):
    """Of a recurrent layer, beside LayerWeights' q, which projects all channels, and o.

    Where what is projected is stored key head by key head, q holds z too, and b holds a.
    """

    z: Leaf | None  # [Hv * Dv, M], the gate of the outputs
    b: Leaf  # [Hv, M], how much of a value is written
    a: Leaf | None  # [Hv, M], how much of the state is kept
    conv: Leaf  # [channels, 1, taps]
    decay: Leaf  # [Hv], logarithm of the rate; float32 whatever the compute dtype, as the next
    step: Leaf  # [Hv], added to a
    norm: Leaf  # [Dv], of the outputs; its weights are as they are


@struct.dataclass
class IndexerWeights(Generic[Leaf]):
    """Of what chooses the positions that are attended."""

    q: Leaf  # [index heads * index dim, rank of queries]
    k: Leaf  # [index dim, M]
    k_norm: Leaf  # [index dim]
    k_norm_bias: Leaf
    heads: Leaf  # [index heads, M], the weight of each


@struct.dataclass
class LayerWeights(Generic[Leaf]):
    """Everything of one layer but its routed experts. Leaves are TensorSpecs or arrays of those shapes.

    What a family or a layer does not have is None. A norm with a bias is a LayerNorm, one without an RMSNorm.
    """

    input_norm: Leaf | None  # [M]; EAGLE-1 has none
    q: Leaf  # [H * D, M]; after q_a: [H * D, its rank]
    k: Leaf | None  # [K * D, M]
    v: Leaf | None  # [K * D, M]
    o: Leaf  # [M, H * D]
    post_norm: Leaf  # [M]
    router: Leaf | None = None  # [E, M]
    router_bias: Leaf | None = None  # [E], of the logits
    choice_bias: Leaf | None = None  # [E], of the choice alone; float32 whatever the compute dtype
    q_bias: Leaf | None = None
    k_bias: Leaf | None = None
    v_bias: Leaf | None = None
    o_bias: Leaf | None = None
    q_norm: Leaf | None = None  # [D] or [H * D]
    k_norm: Leaf | None = None  # [D] or [K * D]
    sinks: Leaf | None = None  # [H]
    mlp: MlpWeights[Leaf] | None = None  # a dense layer's, or the shared expert
    shared_gate: Leaf | None = None  # [1, M]
    input_norm_bias: Leaf | None = None
    post_norm_bias: Leaf | None = None
    cross: CrossWeights[Leaf] | None = None
    # Latent attention: down- and up-projections.
    q_a: Leaf | None = None
    q_a_norm: Leaf | None = None
    kv_a: Leaf | None = None  # [rank + rope, M]
    kv_a_norm: Leaf | None = None  # [rank]
    kv_b: Leaf | None = None  # [H * (nope + value), rank]
    indexer: IndexerWeights[Leaf] | None = None
    recurrent: RecurrentWeights[Leaf] | None = None


@struct.dataclass
class EncoderWeights(Generic[Leaf]):
    """The encoder but for its experts and the embeddings, which are the decoder's."""

    layers: tuple[LayerWeights[Leaf], ...]
    final_norm: Leaf  # [M]
    final_norm_bias: Leaf | None


@struct.dataclass
class Weights(Generic[Leaf]):
    """Everything of a model but its experts: what always lives on the accelerator."""

    embed: Leaf  # [V, M]
    layers: tuple[LayerWeights[Leaf], ...]
    final_norm: Leaf  # [M]
    lm_head: Leaf | None  # [V, M]; None: tied to embed
    final_norm_bias: Leaf | None = None
    encoder: EncoderWeights[Leaf] | None = None

    @property
    def outer(self) -> "Weights[Leaf]":
        """What comes before and after the layers: a program that is handed no more is as fast to call in any depth."""
        return dataclasses.replace(self, layers=(), encoder=None)


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


def random_block(layout: Layout, shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    """An expert's block with the random test weights of its parts; of a fused tensor, its entry."""

    def read(part: Part) -> np.ndarray:
        values = random_tensor(part.spec, seed)
        return values if part.index is None else values[part.index]

    return fill_block(((part.view, read(part)) for part in layout), shape, dtype)


def fill_block(pieces, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A block from (view, values) pieces; what no piece fills is zero. dtype: as kept, see below.

    bfloat16 blocks are stored as uint16 bits: XLA:CPU converts the whole buffer to float32 and back on every
    slot write of a bfloat16 array (1.33 ms against 0.13 ms for 1 MB), and a copy does not care.
    """
    block = np.zeros(shape, np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    for view, values in pieces:
        target = view(block)
        target[...] = values.reshape(target.shape)
    return block if dtype == "float32" else block.view(np.uint16)


def gate_of(block: np.ndarray) -> np.ndarray:
    """[F, M]."""
    return block[0]


def up_of(block: np.ndarray) -> np.ndarray:
    """[F, M]."""
    return block[1]


def down_of(block: np.ndarray) -> np.ndarray:
    """[M, F], as checkpoints store it."""
    return block[2].T


def inner_of(block: np.ndarray) -> np.ndarray:
    """[F, M], the first matrix of a bordered block."""
    return block[0, :-1, :-1]


def outer_of(block: np.ndarray) -> np.ndarray:
    """[M, F], the last matrix of a bordered block, as checkpoints store it."""
    return block[-1, :-1, :-1].T


def up_bias_of(block: np.ndarray) -> np.ndarray:
    """[F]: the last column of the first matrix."""
    return block[0, :-1, -1]


def down_bias_of(block: np.ndarray) -> np.ndarray:
    """[M]: the last row of the last matrix."""
    return block[-1, -1, :-1]
