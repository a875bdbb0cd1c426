"""The protocol of a draft: anything that proposes tokens, given what the engine lets it see."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from specmoe_jax.types import KVCache, Proposal, SamplingRows


class DraftView(NamedTuple):
    """What a draft may look at and use in one step.

    length: N, tokens to propose in this step; the engine may change it from step to step.
    kv: the target's cache; a draft that writes rows must return the new one (the old is donated). Rows at and
        after `lengths` are free to write: verification overwrites every one of them.
    lengths: [B] int32, committed rows of the cache; the last committed token is not in it yet.
    last_token: [B] int32. active: [B] bool, False for finished rows.
    history: per row, prompt and generated ids, the last token included.
    rows: sampling parameters. keys: [B] random keys of this step, consumed by the draft (fold in the position).
    coupled: [B, N] keys that draft and target share under deterministic sampling, else None.
    forward: (kv, tokens [B], lengths [B]) -> (logits [B, V], kv): one token through the resident experts only,
        no expert crosses the link. None where the plan keeps no draft experts.
    memory: of the draft's last proposal for these rows (Proposal.memory), None in their first step.
    """

    length: int
    kv: KVCache
    lengths: np.ndarray
    last_token: np.ndarray
    active: np.ndarray
    history: tuple[tuple[int, ...], ...]
    rows: SamplingRows
    keys: jax.Array | None
    coupled: jax.Array | None
    forward: Callable
    memory: Any = None


class Draft(Protocol):
    """Proposes tokens. Any proposal is safe: verification decides, the text never changes."""

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        """The tokens [B, view.length] with the distribution they were drawn from, and the cache after drafting."""
        ...
