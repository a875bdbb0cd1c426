"""The target's own layers for further tokens as a draft: caches of their own, fed by the target's states of what was committed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models import mtp
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.speculate.drafts.eagle import draft_chain, known, remember
from specmoe_jax.speculate.drafts.grown_tree import TreeShape, grow
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.types import KVCache, Proposal


class MtpMemory(NamedTuple):
    """kv: a cache of one layer for each. states: of each, [B, M] after its norm, of the last row that it wrote.

    Layer k reads the token k + 1 places behind a row's position, so of P known tokens its cache holds P - k rows; what is beyond
    was drafted and is overwritten. counts: of each, [E] float32, how often observed positions chose an expert; () where not all
    are on the accelerator, else nobody asks.
    """

    kv: tuple[KVCache, ...]
    states: tuple[jax.Array, ...]
    counts: tuple[jax.Array, ...] = ()


class MtpDraft(NamedTuple):
    """Drafts with layers whose weights and experts are on the accelerator: chains, or trees of one layer.

    A step goes as EAGLE's: the target's states of the committed tokens extend the first layer's cache (`observe`), and its own
    those of the next; the first gives the first token. A layer alone is then fed its own states; of several, each gives one token
    more, of the states of the layer before it.
    """

    head: MtpHead
    tree: TreeShape | None = None

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """None: it takes the state after the final norm."""
        return ()

    def new_memory(self, rows: int, positions: int) -> MtpMemory:
        weights, caches = self.head.weights.fc, []
        for layer in self.head.chain:
            attention = layer.config.attention
            shape = (rows, attention.num_kv_heads, positions, attention.cache_dim)
            k, v = (jnp.zeros(shape, weights.dtype, device=weights.device) for _ in range(2))
            caches.append(KVCache(k=(k,), v=(v,)))
        states = (jnp.zeros((rows, len(weights)), weights.dtype, device=weights.device) for _ in caches)
        return MtpMemory(kv=tuple(caches), states=tuple(states))

    def observe(self, memory: MtpMemory, rows, following, features, lengths, num_new) -> MtpMemory:
        return _observe(self.head, memory, rows, following, features, lengths, num_new)

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        memory, chain = view.memory, self.head.chain
        caches, state, num_new = list(memory.kv), known(memory.states[0], view.lengths), view.active.astype(np.int32)
        if self.tree is not None:
            tokens, tree, kv = _grow(self.head, self.tree, view.length, state, caches[0], view.lengths, num_new)
            return Proposal(tokens=tokens, probs=None, memory=memory._replace(kv=(kv,)), tree=tree), view.kv
        drafted, outputs = [], jnp.zeros((len(num_new), 0, state.shape[1]), state.dtype)

        def advance(token, state, at):
            nonlocal outputs
            if len(chain) == 1:
                logits, state, caches[0] = _next(chain[0], token, state, caches[0], at, num_new)
                return logits, state
            drafted.append(token)
            index = len(drafted)
            given = (jnp.stack(drafted, 1), outputs, memory.states[index - 1], caches[index])
            logits, outputs, caches[index] = _further(chain[index], index, *given, view.lengths, num_new)
            return logits, state

        tokens, probs = draft_chain(_logits(self.head, state), view, state, advance)
        return Proposal(tokens=tokens, probs=probs, memory=memory._replace(kv=tuple(caches))), view.kv


_logits = jax.jit(mtp.logits)


@functools.partial(jax.jit, donate_argnums=1)
def _observe(head: MtpHead, memory: MtpMemory, rows, following, features, lengths, num_new) -> MtpMemory:
    """See speculate.drafts.protocol.FeatureDraft."""
    with jax.named_scope("mtp_observe"):
        outputs, caches, states, counts = features.astype(head.weights.fc.dtype), [], [], []
        for index, layer in enumerate(head.chain):
            before = None if index == 0 else memory.states[index - 1][jnp.clip(rows, 0)]
            given = (following, outputs, before, memory.kv[index], rows, lengths, num_new)
            outputs, kv, count, chosen = _behind(layer, index, *given)
            caches.append(kv)
            states.append(remember(memory.states[index], outputs, rows, count))
            if memory.counts:
                assert chosen is not None  # a layer with experts
                counts.append(_counted(memory.counts[index], chosen))
        return MtpMemory(kv=tuple(caches), states=tuple(states), counts=tuple(counts))


def _counted(counts: jax.Array, chosen: jax.Array) -> jax.Array:
    """counts [E] with the choices [n, A], -1 for padding."""
    return counts.at[jnp.where(chosen < 0, len(counts), chosen)].add(1, mode="drop")


def _behind(layer: MtpHead, index: int, tokens, outputs, before, kv: KVCache, rows, lengths, num_new):
    """Extends the cache of the index-th layer, which is `index` rows behind the first.

    tokens [b, T] follow positions lengths[b] + t; outputs: of the layer before it, of its own rows for these tokens; before
    [b, M]: of that layer's last row before them. -> outputs, the cache, the number of rows [b], and the experts that were chosen.
    """
    if index == 0:
        outputs, kv, chosen = mtp.forward_routed(layer, tokens, outputs, kv, rows, lengths, num_new)
        return outputs, kv, num_new, chosen
    width, begins = tokens.shape[1], lengths < index  # then no row is behind, and the first tokens are not read
    skipped = jnp.maximum(index - lengths, 0)
    shifted = jnp.concatenate([before[:, None], outputs], axis=1)[:, :width]
    aligned = jnp.pad(outputs, ((0, 0), (0, width - outputs.shape[1]), (0, 0)))
    states = jnp.where(begins[:, None, None], aligned, shifted)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(jnp.arange(width) + skipped[:, None], width - 1), axis=1)
    count = jnp.maximum(num_new - skipped, 0)
    outputs, kv, chosen = mtp.forward_routed(layer, tokens, states, kv, rows, jnp.maximum(lengths - index, 0), count)
    return outputs, kv, count, chosen


@functools.partial(jax.jit, static_argnums=1, donate_argnums=5)
def _further(layer: MtpHead, index: int, tokens, outputs, before, kv: KVCache, lengths, num_new):
    """The logits [B, V] of the index-th layer after the tokens [B, index] that were drafted; its outputs and its cache.

    outputs [B, index - 1, M]: of the layer before it, of the rows that were drafted; num_new [B]: 1 for rows that draft.
    """
    with jax.named_scope("mtp_further"):
        rows = jnp.arange(len(tokens), dtype=jnp.int32)
        outputs, kv, count, _ = _behind(layer, index, tokens, outputs, before, kv, rows, lengths, num_new * index)
        last = jnp.take_along_axis(outputs, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return mtp.logits(layer, last), outputs, kv


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=4)
def _grow(head: MtpHead, shape: TreeShape, depth: int, state, kv: KVCache, lengths, num_new):
    """A tree in every row; state [B, M]: after the last committed token. -> tokens [B, N], Tree, kv."""
    with jax.named_scope("mtp_grow"):
        return grow(mtp, head.config.attention, head, shape, depth, state, kv, lengths, num_new)


@functools.partial(jax.jit, donate_argnums=3)
def _next(head: MtpHead, token, state, kv: KVCache, lengths, num_new):
    """One fed-back row of every sequence: token [B], state [B, M] -> logits [B, V], state [B, M], kv."""
    with jax.named_scope("mtp_next"):
        rows = jnp.arange(len(token), dtype=jnp.int32)
        states, kv = mtp.forward(head, token[:, None], state[:, None], kv, rows, lengths, num_new)
        return mtp.logits(head, states[:, 0]), states[:, 0], kv
