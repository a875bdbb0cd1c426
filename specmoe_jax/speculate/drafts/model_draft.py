"""A smaller model of the same vocabulary as the draft, with a KV cache of its own (Leviathan et al. 2023)."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.speculate.drafts.self_draft import choose_token, so_far
from specmoe_jax.types import KVCache, Proposal


class DraftCache(NamedTuple):
    """The draft's memory between steps. lengths: [B] int32, rows of kv that were written, drafted ones included.

    ids: [B], the requests that they belong to.
    """

    kv: KVCache
    lengths: np.ndarray
    ids: np.ndarray


class ModelDraft(NamedTuple):
    """Drafts with another model. Rejected tokens are rolled back by lengths: their rows are overwritten.

    forward: (kv, tokens [B, T], lengths [B], num_new [B]) -> (logits [B, V] after the last new token of each row, kv).
    new_cache: (rows, positions) -> KVCache. chunk: positions of a catching-up pass, over a prompt or steps without a draft.
    """

    forward: Callable
    new_cache: Callable[[int, int], KVCache]
    chunk: int

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        kv, valid = self._catch_up(view)
        waiting = np.where(view.active, view.lengths - valid, 0)  # 0 or 1: the last drafted token, when all were accepted
        tokens, num_new = _following(view, valid, waiting + 1, 2)
        logits, kv = self.forward(kv, tokens, valid, num_new)
        drafted, probs = [], []
        for position in range(view.length):
            if position:
                lengths = view.lengths + np.int32(position)
                logits, kv = self.forward(kv, drafted[-1][:, None], lengths, view.active.astype(np.int32))
            token, q = choose_token(view.choice, np.int32(position), logits, so_far(drafted, view.choice, view.length))
            drafted.append(token)
            probs += [] if q is None else [q]
        lengths = np.where(view.active, view.lengths + view.length, valid).astype(np.int32)
        memory = DraftCache(kv=kv, lengths=lengths, ids=view.ids)
        return Proposal(tokens=jnp.stack(drafted, 1), probs=jnp.stack(probs, 1) if probs else None, memory=memory), view.kv

    def _catch_up(self, view: DraftView) -> tuple[KVCache, np.ndarray]:
        """The cache with all committed rows but at most one, and how many of each row's are valid.

        A new cache gets at least one pass, so that it is compiled when the engine warms up.
        """
        rows, first = len(view.history), view.memory is None
        if first:
            kv, valid = self.new_cache(rows, view.positions), np.zeros(rows, np.int32)
        else:
            kv, valid = view.memory.kv, np.minimum(view.memory.lengths, view.lengths)
            valid = np.where(view.memory.ids == view.ids, valid, 0).astype(np.int32)
        while first or (np.where(view.active, view.lengths - valid, 0) > 1).any():
            tokens, num_new = _following(view, valid, view.lengths - valid, self.chunk)
            _, kv = self.forward(kv, tokens, valid, num_new)
            valid, first = valid + num_new, False
        return kv, valid


def _following(view: DraftView, valid: np.ndarray, wanted: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The next tokens of each active row's text, [B, width] int32, and how many they are, [B]: `wanted` or `width`."""
    num_new = np.where(view.active, np.minimum(wanted, width), 0).astype(np.int32)
    tokens = np.zeros((len(num_new), width), np.int32)
    for row, count in enumerate(num_new):
        tokens[row, :count] = view.history[row][valid[row] : valid[row] + count]
    return tokens, num_new


def vocabulary_difference(target, draft) -> str | None:
    """Why a model cannot draft for another: the sizes or the tokenizers' words differ; None when it can."""
    if target.config.vocab_size != draft.config.vocab_size:
        return f"its vocabulary has {draft.config.vocab_size} tokens, the model's {target.config.vocab_size}"
    if target.tokenizer is None or draft.tokenizer is None:
        return None
    words, others = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (target.tokenizer, draft.tokenizer))
    odd = sum(others.get(word) != token for word, token in words.items()) + len(others.keys() - words.keys())
    return f"its tokenizer has {odd} other tokens than the model's" if odd else None
