"""The target's own layer for further tokens as a draft: a cache of its own, fed by the target's states of what was committed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models import mtp
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.speculate.drafts.eagle import EagleMemory, draft_chain, known, remember
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.types import KVCache, Proposal


class MtpDraft(NamedTuple):
    """Drafts chains with a layer whose weights and experts are on the accelerator.

    A step goes as EAGLE's: the target's states of the committed tokens extend the layer's cache (`observe`), which gives the
    first token; each further one feeds the layer's own state back. EagleMemory.feature is that state, after its norm.
    """

    head: MtpHead

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """None: it takes the state after the final norm."""
        return ()

    def new_memory(self, rows: int, positions: int) -> EagleMemory:
        attention, weights = self.head.config.attention, self.head.weights.fc
        shape = (rows, attention.num_kv_heads, positions, attention.cache_dim)
        k, v = (jnp.zeros(shape, weights.dtype, device=weights.device) for _ in range(2))
        state = jnp.zeros((rows, len(weights)), weights.dtype, device=weights.device)
        return EagleMemory(kv=KVCache(k=(k,), v=(v,)), feature=state)

    def observe(self, memory: EagleMemory, rows, following, features, lengths, num_new) -> EagleMemory:
        return _observe(self.head, memory, rows, following, features, lengths, num_new)

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        memory = view.memory
        kv, state, num_new = memory.kv, known(memory.feature, view.lengths), view.active.astype(np.int32)

        def advance(token, state, at):
            nonlocal kv
            logits, state, kv = _next(self.head, token, state, kv, at, num_new)
            return logits, state

        tokens, probs = draft_chain(_logits(self.head, state), view, state, advance)
        return Proposal(tokens=tokens, probs=probs, memory=memory._replace(kv=kv)), view.kv


_logits = jax.jit(mtp.logits)


@functools.partial(jax.jit, donate_argnums=1)
def _observe(head: MtpHead, memory: EagleMemory, rows, following, features, lengths, num_new) -> EagleMemory:
    """See speculate.drafts.protocol.FeatureDraft."""
    with jax.named_scope("mtp_observe"):
        states, kv = mtp.forward(head, following, features.astype(head.weights.fc.dtype), memory.kv, rows, lengths, num_new)
        return EagleMemory(kv=kv, feature=remember(memory.feature, states, rows, num_new))


@functools.partial(jax.jit, donate_argnums=3)
def _next(head: MtpHead, token, state, kv: KVCache, lengths, num_new):
    """One fed-back row of every sequence: token [B], state [B, M] -> logits [B, V], state [B, M], kv."""
    with jax.named_scope("mtp_next"):
        rows = jnp.arange(len(token), dtype=jnp.int32)
        states, kv = mtp.forward(head, token[:, None], state[:, None], kv, rows, lengths, num_new)
        return mtp.logits(head, states[:, 0]), states[:, 0], kv
