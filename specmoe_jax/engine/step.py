"""One step of every row: draft, verify (which migrates layer by layer), commit."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.finish import commit_tokens
from specmoe_jax.engine.forward import TargetPass, draft_forward, target_pass
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import State, StepInfo
from specmoe_jax.speculate.acceptance import accept, accept_greedy
from specmoe_jax.speculate.draft import DraftView
from specmoe_jax.speculate.sampling import Stream, row_keys
from specmoe_jax.speculate.self_draft import substitute_slots
from specmoe_jax.types import AcceptResult, KVCache, Proposal

_accept = jax.jit(accept)
_accept_greedy = jax.jit(accept_greedy)
_row_keys = jax.jit(row_keys, static_argnames="stream")
def step(rt: Runtime, state: State, tokenizer) -> tuple[State, StepInfo]:
    """Every active row gets between 1 and N + 1 tokens. Consumes the state.

    The migration of SpecMoE happens inside `verify`, layer by layer: which experts a layer needs is known only
    when the layer before it has run.
    """
    clock, sent = [time.perf_counter()], [rt.store.link.sent_bytes]
    activations = rt.activations.sent_bytes
    proposal, kv = draft(rt, state)
    clock.append(time.perf_counter())
    sent.append(rt.store.link.sent_bytes)
    verified, result = verify(rt, state, proposal, kv)
    clock.append(time.perf_counter())
    sent.append(rt.store.link.sent_bytes)
    new_state, accepted, committed = commit(rt, state, proposal, verified, result, tokenizer)
    clock.append(time.perf_counter())
    return new_state, StepInfo(
        accepted=accepted,
        committed=committed,
        active=state.active,
        start=np.array([len(tokens) for tokens in state.generated]),
        drafted=rt.plan.draft_length or 0,
        verify=verified.info,
        link_bytes=sent[2] - sent[0],
        draft_link_bytes=sent[1] - sent[0],
        activation_bytes=rt.activations.sent_bytes - activations,
        draft_s=clock[1] - clock[0],
        verify_s=clock[2] - clock[1],
        commit_s=clock[3] - clock[2],
    )


def draft(rt: Runtime, state: State) -> tuple[Proposal, KVCache]:
    """The draft's tokens [B, N]; N = 0 without a draft. Blocks until they are there."""
    if rt.draft is None:
        return Proposal(tokens=jnp.zeros((len(state.requests), 0), jnp.int32), probs=None), state.kv
    pool, active = state.memory.pool, state.active
    slots = None if rt.neighbours is None else substitute_slots(state.memory.residency.slot_of, rt.neighbours)
    view = DraftView(
        kv=state.kv,
        lengths=state.lengths,
        last_token=state.last_token,
        active=active,
        history=tuple(
            () if request is None else request.token_ids + tokens
            for request, tokens in zip(state.requests, state.generated, strict=True)
        ),
        rows=state.rows,
        keys=step_keys(state, Stream.DRAFT),
        forward=lambda kv, tokens, lengths: draft_forward(rt, pool, slots, kv, tokens, lengths, active),
    )
    return jax.block_until_ready(rt.draft.propose(view))


def verify(rt: Runtime, state: State, proposal: Proposal, kv: KVCache) -> tuple[TargetPass, AcceptResult]:
    """One exact pass over [last token, drafted tokens] of every row, and the lossless choice."""
    tokens = jnp.concatenate([jnp.asarray(state.last_token)[:, None], proposal.tokens], axis=1)  # [B, T]
    num_new = np.where(state.active, tokens.shape[1], 0).astype(np.int32)
    votes = np.zeros((rt.config.num_layers, rt.config.num_experts), np.int64)
    verified = target_pass(rt, state.memory, kv, tokens, state.lengths, num_new, votes)
    logits = stages.head(rt.config, rt.weights, verified.h)  # [B, T, V]
    if state.rows.greedy:
        result = _accept_greedy(proposal.tokens, logits)
    else:
        keys = step_keys(state, Stream.VERIFY)
        result = _accept(keys, proposal.tokens, proposal.probs, logits, state.rows)
    return verified, jax.device_get(result)


def commit(
    rt: Runtime, state: State, proposal: Proposal, verified: TargetPass, result: AcceptResult, tokenizer
) -> tuple[State, np.ndarray, np.ndarray]:
    """Appends the accepted run and the target's token to each active row, cut where the request ends.

    Returns the new state, the drafted tokens accepted [B] and the tokens committed [B].
    """
    drafted, rows = np.asarray(proposal.tokens), len(state.requests)
    generated, reasons = list(state.generated), list(state.finish_reasons)
    accepted, committed = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    last_token = state.last_token.copy()
    for row in np.flatnonzero(state.active):
        run = (*drafted[row, : result.num_accepted[row]].tolist(), int(result.next_token[row]))
        generated[row], reasons[row] = commit_tokens(
            state.requests[row], state.generated[row], run, rt.config.eos_token_ids, tokenizer
        )
        accepted[row] = result.num_accepted[row]
        committed[row] = len(generated[row]) - len(state.generated[row])
        last_token[row] = generated[row][-1]
    new_state = state._replace(
        kv=verified.kv,
        memory=verified.memory,
        lengths=state.lengths + committed,
        last_token=last_token,
        generated=tuple(generated),
        finish_reasons=tuple(reasons),
    )
    return new_state, accepted, committed


def step_keys(state: State, stream: Stream) -> jax.Array | None:
    """[B] keys from (seed, request id, committed length), so that batch mates change no draw; None if all greedy."""
    if state.rows.greedy:
        return None
    seeds = np.array([0 if r is None else r.params.seed for r in state.requests], np.uint32)
    ids = np.array([0 if r is None else r.id for r in state.requests], np.uint32)
    return _row_keys(seeds, ids, state.lengths.astype(np.uint32), stream=stream)
