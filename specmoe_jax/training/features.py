"""The target's hidden states of whole rows of text, taken from the engine as it prefills, batch by batch: none are stored."""

import jax.numpy as jnp
import numpy as np

from specmoe_jax.types import Proposal


class FeatureTap:
    """A draft that drafts nothing of use and keeps what it is fed, for one batch at a time.

    A speculate.drafts.protocol.FeatureDraft.

    The engine runs under any plan, so the target may be larger than the accelerator.
    """

    feature_layers: tuple[int, ...] = ()

    def new_memory(self, rows: int, positions: int) -> None:
        self._pieces = {}

    def observe(self, memory, rows, following, features, lengths, num_new):
        start = int(np.max(np.where(num_new > 0, lengths, 0)))
        if np.any(num_new) and start not in self._pieces:
            self._pieces[start] = features
        return memory

    def propose(self, view):
        return Proposal(tokens=np.zeros((len(view.history), view.length), np.int32), probs=None), view.kv

    def take(self, length: int):
        """Features [B, length, M] of the first positions of the rows, which are all at least that long."""
        return jnp.concatenate([self._pieces[start] for start in sorted(self._pieces)], axis=1)[:, :length]
