"""The draft's half of a step: proposes tokens, and prefetches over the idle link the experts that its gates predict."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.flows.layer_passes import DraftForward
from specmoe_jax.engine.flows.migration import wait_for_copies
from specmoe_jax.engine.requests.grammars import Rows, draft_masks, pass_masks
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory, HostKV, Request, State
from specmoe_jax.kv_cache.positions import KV_PAGE
from specmoe_jax.speculate.adaptive_length import compiled_lengths
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.speculate.logit_edits import LogitEdits, logit_edits
from specmoe_jax.speculate.sampling import Stream, coupled_keys, row_keys
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import KVCache, Proposal, RecurrentState, SomeRows


class Drafted(NamedTuple):
    """predicted: [L, E] int64, how often the draft's gates chose each expert. prefetched: experts copied.

    row_lengths: [B] int32, tokens of each row to verify; those beyond are -1. None for all.
    """

    proposal: Proposal
    kv: KVCache | HostKV
    memory: ExpertMemory
    predicted: np.ndarray
    prefetched: int
    row_lengths: np.ndarray | None = None


def draft(runtime: Runtime, state: State, length: int, edits: LogitEdits | None = None) -> Drafted:
    """`length` tokens per row, none for length 0. Blocks until they are there. Consumes the state's buffers.

    edits: of the rows' logits (`step_edits`). Where something ends the rows' drafts, `draft_length` tokens are drafted and as many
    columns stay as a compiled pass has that verifies the longest row; `length` of them where no row is active.
    """
    if length == 0:
        nothing = Proposal(tokens=np.zeros((len(state.requests), 0), np.int32), probs=None, memory=state.draft_memory)
        return Drafted(nothing, state.kv, state.memory, np.zeros(state.memory.usage_scores.shape, np.int64), 0)
    active, width, stopping = state.active, length, runtime.plan.stopping
    length = length if stopping is None else runtime.plan.draft_length or length
    forward = _forward(runtime, state, active, length)
    masks = draft_masks(_grammars(state), runtime.config.vocab_size) if _constrained(state) else None
    view = DraftView(
        length=length,
        positions=_positions(state.kv),
        kv=state.kv,
        lengths=state.lengths,
        last_token=state.last_token,
        active=active,
        ids=np.array([-1 if request is None else request.id for request in state.requests]),
        history=tuple(
            () if request is None else request.token_ids + tokens
            for request, tokens in zip(state.requests, state.generated, strict=True)
        ),
        rows=state.rows,
        keys=None if state.rows.greedy else step_keys(state, Stream.DRAFT),
        coupled=step_coupled_keys(state, runtime.plan.draft_length or length) if runtime.plan.deterministic_sampling else None,
        forward=forward,
        chain=None if masks else forward and forward.chain,
        memory=state.draft_memory,
        edits=edits,
        masks=masks,
    )
    assert runtime.draft is not None  # else the length is 0
    proposed = runtime.draft.propose(view)
    check_proposed(proposed, rows=len(state.requests))
    proposal, kv = jax.block_until_ready(proposed)
    if forward is None:
        return Drafted(proposal, kv, state.memory, np.zeros(state.memory.usage_scores.shape, np.int64), 0)
    drafted = Drafted(proposal, kv, forward.memory, forward.predicted, forward.prefetched)
    if stopping is None:
        return drafted
    lengths = np.full(len(active), width, np.int32)
    if active.any():
        held = held_experts(drafted.memory)[: len(forward.predicted)]
        lengths = stopping.lengths(state.row_stops, np.stack(forward.choices), active, held)
        if not runtime.plan.deterministic_sampling:
            # Whether a token of a row that draws by probabilities is verified must not depend on the token, or its law changes.
            lengths = np.where(active & (state.rows.temperature > 0), np.int32(length), lengths)
        width = next(size for size in compiled_lengths(length) if size >= lengths.max())
    return drafted._replace(proposal=_cut(proposal, lengths, width), row_lengths=lengths)


def held_experts(memory: ExpertMemory) -> np.ndarray:
    """[L, E] bool, experts on the accelerator, resident or retained."""
    held = memory.residency.slot_of >= 0
    if memory.retained_experts is not None:
        holds = memory.retained_experts.holds
        held.reshape(-1)[holds[holds >= 0]] = True
    return held


def _cut(proposal: Proposal, lengths: np.ndarray, width: int) -> Proposal:
    """The first `width` columns, -1 beyond each row's length [B]: no proposals, whose probabilities are 0."""
    keep = np.arange(width) < lengths[:, None]
    probs = None if proposal.probs is None or not width else _cut_probs(proposal.probs, keep)
    return proposal._replace(tokens=np.where(keep, np.asarray(proposal.tokens)[:, :width], -1), probs=probs)


@jax.jit
def _cut_probs(probs: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep[..., None], probs[:, : keep.shape[1]], 0.0)


def _forward(runtime: Runtime, state: State, active: np.ndarray, length: int) -> DraftForward | None:
    """None for a draft that does not run the target."""
    slots = runtime.draft_executor.slots(runtime, state.memory)
    if slots is None:
        return None
    return DraftForward(runtime, wait_for_copies(runtime, state.memory), slots, active, length)


def check_proposed(proposed: object, *, rows: int) -> None:
    """Raises PlanError for a proposal that no step can verify."""
    if not (isinstance(proposed, tuple) and len(proposed) == 2 and isinstance(proposed[0], Proposal)):
        raise PlanError(f"the draft object proposed a {type(proposed).__name__}; propose(view) returns (Proposal, kv)")
    tokens = proposed[0].tokens
    is_array = isinstance(tokens, np.ndarray | jax.Array)
    if not is_array or tokens.ndim != 2 or len(tokens) != rows or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} {list(tokens.shape)}" if is_array else f"a {type(tokens).__name__}"
        raise PlanError(f"the draft object proposed tokens that are {got}; give an int32 array [{rows}, view.length]")


def step_edits(state: State) -> LogitEdits | None:
    """What the rows of a step ask to be done to logits, given what was committed; None in a job that asks for nothing."""
    if state.options.edits is None:
        return None
    nothing = SamplingParams()
    return logit_edits(
        state.options.edits,
        [request.params if request else nothing for request in state.requests],
        [(*_told(request), *tokens) for request, tokens in zip(state.requests, state.generated, strict=True)],
        [len(_told(request)) for request in state.requests],
        _positions(state.kv),
    )


def pass_edits(runtime: Runtime, state: State, edits: LogitEdits | None, proposal: Proposal) -> LogitEdits | None:
    """`edits` with what the grammars of the rows allow at each position of the pass that verifies a proposal."""
    if edits is None or not _constrained(state):
        return edits
    return edits._replace(masks=pass_masks(_grammars(state), proposal, runtime.config.vocab_size))


def _constrained(state: State) -> bool:
    return state.options.edits is not None and state.options.edits.grammars


def _grammars(state: State) -> Rows:
    return [
        (request.grammar, tokens) if request and request.grammar and active else None
        for request, tokens, active in zip(state.requests, state.generated, state.active, strict=True)
    ]


def _told(request: Request | None) -> tuple[int, ...]:
    """The tokens before the answer's."""
    return () if request is None else request.token_ids


def _positions(kv: KVCache | HostKV) -> int:
    """S of the cache; in every layer alike, but recurrent ones have none."""
    if isinstance(kv, HostKV):
        return kv.pages.table.shape[1] * KV_PAGE
    keys = next(keys for keys in kv.k if not isinstance(keys, RecurrentState))
    return (keys.cache if isinstance(keys, SomeRows) else keys).shape[2]


_row_keys = jax.jit(row_keys, static_argnames="stream")
_coupled_keys = jax.jit(coupled_keys)


def step_keys(state: State, stream: Stream) -> jax.Array:
    """[B] keys from (seed, request id, committed length) alone, so that batch mates do not change a row's draws."""
    return _row_keys(*_seeds_and_ids(state), state.lengths.astype(np.uint32), stream=stream)


def step_coupled_keys(state: State, num_positions: int) -> jax.Array:
    """[B, num_positions] keys of the positions that a step may fill; the first is that of the row's next token."""
    positions = state.lengths[:, None] + np.arange(num_positions)
    return _coupled_keys(*_seeds_and_ids(state), positions.astype(np.uint32))


def _seeds_and_ids(state: State) -> tuple[np.ndarray, np.ndarray]:
    seeds = [0 if request is None else request.params.seed for request in state.requests]
    ids = [0 if request is None else request.key_id for request in state.requests]
    return np.array(seeds, np.uint32), np.array(ids, np.uint32)
