"""The shape alphabet and the tuples that cross rooms.

Shape alphabet, used in einsums, C++ and tests alike:
    B batch rows, N drafted tokens, T new positions of a pass (N + 1 when verifying), S cached positions,
    H query heads, K key/value heads, D head dim, M model dim, F expert hidden, L layers (beside an E:
    those with experts), E experts, A active experts per token, R resident expert slots, V vocabulary, n = B * T flattened tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Device: TypeAlias = Any  # a jax.Device, of which jax publishes no type
Place: TypeAlias = Any  # where arrays are put: a Device, or a Sharding over several


MESH_AXIS = "devices"  # of the mesh of a plan for several devices


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks",), meta_fields=("mesh",))
@dataclasses.dataclass(frozen=True)
class ShardedPool:
    """The expert slots of several devices. blocks: [R, 3, F, M], of which device d holds the d-th of equal parts."""

    blocks: jax.Array
    mesh: jax.sharding.Mesh


Pool: TypeAlias = Any  # of expert slots: a jax.Array [R, 3, F, M], or a ShardedPool


class CrossCache(NamedTuple):
    """Keys and values [B, K, S, D] of what the encoder read, for one decoder layer; row b has lengths[b] positions."""

    k: jax.Array
    v: jax.Array
    lengths: jax.Array


class RecurrentState(NamedTuple):
    """What a recurrent layer keeps of each sequence (models/recurrent.py), float32.

    state: [B, Hv, Dk, Dv] after the first start[b] positions. start: [B] int32. rows: [B, kept, row] of the positions since
    then and of a few before, position p at p % kept: what a pass that begins at any of them replays.
    """

    state: jax.Array
    start: jax.Array
    rows: jax.Array


class KVCache(NamedTuple):
    """Keys and values of every layer, one buffer a layer so that each can be donated on its own.

    k, v: L arrays [B, K, S, D]. Row b holds `lengths[b]` committed positions; what lies beyond is never read. A recurrent layer
    has its RecurrentState in k, and nothing, (), in v. Where a step runs few of the rows, k has them as SomeRows.
    cross: of each layer, written by the encoder and never donated; None without one.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    cross: tuple[CrossCache, ...] | None = None


class SomeRows(NamedTuple):
    """A layer's keys cache [B, K, S, D], of which a batch of b sequences has the rows [b] int32, no two alike; its values too."""

    cache: Any
    rows: Any


class Routing(NamedTuple):
    """What the router of one layer decided.

    ids: [n, A] int32, -1 for tokens that are padding or belong to finished rows.
    weights: [n, A] float32.
    """

    ids: jax.Array
    weights: jax.Array


class SamplingRows(NamedTuple):
    """Sampling parameters of the rows of a batch, as arrays so that requests may differ.

    temperature: [B] float32, 0 = greedy. top_k: [B] int32, 0 = all. top_p: [B] float32, 1 = all. min_p: [B] float32, 0 = all.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray

    @property
    def greedy(self) -> bool:
        """Whether every row takes the argmax, so that no probability has to be computed."""
        return bool((np.asarray(self.temperature) == 0).all())


class TokenLogprob(NamedTuple):
    """The log-probability of a token under the model's own distribution, and the k most likely tokens beside it with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Tree(NamedTuple):
    """Shape of the T nodes of a pass: node 0 is the last committed token, parents come before children.

    parents: [B, T] int32, 0 for the root's own. depths: [B, T] int32, ancestors of each. mask: [B, T, T] bool, node (row)
    attends node (column): its ancestors and itself.
    """

    parents: jax.Array
    depths: jax.Array
    mask: jax.Array


class Grown(NamedTuple):
    """Keys and values [B, E, K, D] of the nodes of a tree that a draft's layer has computed, and how they hang together."""

    k: jax.Array
    v: jax.Array
    tree: Tree


class Proposal(NamedTuple):
    """What a draft proposes for each row.

    tokens: [B, N] int32.
    probs: [B, N, V] float32, the distribution that token j was really drawn from; None when the draft is a
        point mass (tokens picked by argmax, n-gram lookup), which acceptance treats as such.
    memory: what the draft wants to see again in the next step of these rows; arrays in it may be donated then.
    tree: how the tokens hang together, T = N + 1; None where each follows the one before it. Its nodes are point masses.
    """

    tokens: jax.Array | np.ndarray
    probs: jax.Array | None
    memory: Any = None
    tree: Tree | None = None


class AcceptResult(NamedTuple):
    """num_accepted: [B] int32 in 0..N. next_token: [B] int32, the target's own token after the accepted run."""

    num_accepted: jax.Array | np.ndarray
    next_token: jax.Array | np.ndarray


class AcceptedPath(NamedTuple):
    """What verification accepts of a tree. path: [B, depth] int32, the accepted nodes from the root down, then 0.

    num_accepted: [B] int32 in 0..depth. next_token: [B] int32, the target's own token after them.
    """

    path: jax.Array
    num_accepted: jax.Array
    next_token: jax.Array
