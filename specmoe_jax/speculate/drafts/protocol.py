"""The protocol of a draft: anything that proposes tokens from the view that the engine gives it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from specmoe_jax.speculate.logit_edits import LogitEdits
from specmoe_jax.types import Proposal, SamplingRows


class TokenChoice(NamedTuple):
    """How drafted tokens are chosen from logits; see DraftView."""

    rows: SamplingRows
    keys: jax.Array | None
    coupled: jax.Array | None
    edits: LogitEdits | None = None
    masks: Callable | None = None


class DraftView(NamedTuple):
    """What a draft may look at and use in one step.

    length: N, tokens to propose in this step; the engine may change it from step to step.
    positions: S, cache positions that a row can fill.
    kv: the target's KVCache, under expert_flow=stream its pages in host memory; a draft that writes rows must return
        the new one (the old is donated). Rows at and after `lengths` are free to write: verification overwrites every one of them.
    lengths: [B] int32, committed rows of the cache; the last committed token is not in it yet.
    last_token: [B] int32. active: [B] bool, False for finished rows.
    ids: [B] int64, the request of each row, -1 for none; a row may serve one after the other.
    history: per row, prompt and generated ids, the last token included.
    rows: sampling parameters. keys: [B] random keys of this step, consumed by the draft (fold in the position).
    coupled: keys that draft and target share under deterministic sampling, of the next N positions or more [B, N..], else None.
    forward: (kv, tokens [B], lengths [B]) -> (logits [B, V], kv): one token through the resident experts only,
        no expert crosses the link. None where the plan keeps no draft experts.
    chain: (kv, last_token, lengths, choice, length) -> (tokens [B, N], probs [B, N, V] or None, kv): so many calls of `forward`,
        and the choice of a token after each, as one program. None where the engine acts between two tokens.
    edits: what the requests ask to be done to logits (`speculate.logit_edits.edit_logits`), None where they ask for nothing. A
        draft that does not do it is safe, and accepted less often.
    masks: (position, drafted [B, N]) -> [B, 1, W], `edits.masks` of the token at a position of the step, from the host; None where
        no answer has a grammar. `choose_token` asks it, a call of `forward` after the other, so there is no `chain` then.
    memory: of the draft's last proposal for these rows (Proposal.memory), or what a FeatureDraft made of it since; None in
        the first step of any other draft.
    """

    length: int
    positions: int
    kv: Any
    lengths: np.ndarray
    last_token: np.ndarray
    active: np.ndarray
    ids: np.ndarray
    history: tuple[tuple[int, ...], ...]
    rows: SamplingRows
    keys: jax.Array | None
    coupled: jax.Array | None
    forward: Callable | None
    chain: Callable | None = None
    memory: Any = None
    edits: LogitEdits | None = None
    masks: Callable | None = None

    @property
    def choice(self) -> TokenChoice:
        return TokenChoice(rows=self.rows, keys=self.keys, coupled=self.coupled, edits=self.edits, masks=self.masks)


class Draft(Protocol):
    """Proposes tokens. Any proposal is safe: verification decides, the text never changes."""

    def propose(self, view: DraftView) -> tuple[Proposal, Any]:
        """The tokens [B, view.length] with the distribution they were drawn from, and the cache after drafting."""
        ...


@runtime_checkable
class FeatureDraft(Draft, Protocol):
    """A draft that is fed by the target's hidden states, of every position that is committed (EAGLE).

    feature_layers: the layers whose inputs [.., M] it takes, side by side; empty for the last hidden state after the
    final norm.
    """

    @property
    def feature_layers(self) -> tuple[int, ...]: ...

    def new_memory(self, rows: int, positions: int) -> Any:
        """The memory of a batch of `rows` rows B, before anything was observed."""
        ...

    def observe(self, memory: Any, rows, following, features, lengths, num_new) -> Any:
        """The memory after a pass of the target over T positions of b rows of the batch; the old one is consumed.

        rows: [b] int32, any of 0..B-1 in any order; another number is padding. features: [b, T, M'], of the positions
        lengths[b] + t; following: [b, T] int32, the committed token after each. lengths: [b] int32, positions of the row
        that were observed before, 0 for the first of a request (a row may serve one after the other). num_new: [b] int32,
        columns that count; a row with none stays as it is.

        The engine calls it for every chunk of a prefill and for what each step committed, so a row's observed positions are
        always its committed tokens but the last.
        """
        ...
