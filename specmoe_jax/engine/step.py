"""One step of every row: draft, verify (which migrates layer by layer), commit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.engine import stages
from specmoe_jax.engine.drafting import Drafted, draft, pass_edits, step_coupled_keys, step_edits, step_keys
from specmoe_jax.engine.drafts.accepted_path import Verified, accepted_path, compact_accepted_path
from specmoe_jax.engine.drafts.split_draft import placed, rows_on_cpu
from specmoe_jax.engine.flows.layer_passes import fetched
from specmoe_jax.engine.flows.protocol import TargetPass
from specmoe_jax.engine.requests.finish import commit_tokens
from specmoe_jax.engine.requests.logprobs import path_logprobs, run_logprobs, told_logprobs
from specmoe_jax.engine.requests.routing import told_routing
from specmoe_jax.engine.requests.status import EMPTY, finished
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scheduler import joined
from specmoe_jax.engine.state import State, StepInfo
from specmoe_jax.offload.stream_schedule import ACCELERATOR
from specmoe_jax.offload.tiers import TierCounts
from specmoe_jax.speculate.acceptance import accept, accept_coupled, accept_greedy, decided, synthetic_accept
from specmoe_jax.speculate.adaptive_length import choose, compiled_lengths, observe, resting
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.speculate.logit_edits import LogitEdits, chain_paths, edit_logits, tree_paths
from specmoe_jax.speculate.sampling import Stream
from specmoe_jax.support.processes import agreed
from specmoe_jax.support.timing import Laps
from specmoe_jax.support.tracing import Span, span
from specmoe_jax.types import AcceptResult, Proposal

_accept, _accept_greedy = decided(accept), decided(accept_greedy)
_accept_coupled, _synthetic_accept = decided(accept_coupled), decided(synthetic_accept)
_chain_paths, _tree_paths, _edit_logits = jax.jit(chain_paths), jax.jit(tree_paths), jax.jit(edit_logits)


def step(runtime: Runtime, state: State, tokenizer, *, length: int | None = None) -> tuple[State, StepInfo]:
    """Every active row gets between 1 and N + 1 tokens. Consumes the state.

    length: N, tokens to draft; None: what the state's adaptive length chooses, or the plan says.

    The migration of SpecMoE happens inside `verify`, layer by layer: which experts a layer needs is known only
    when the layer before it has run.
    """
    laps, before = Laps(), moved(runtime)
    active = state.active
    state, moves = placed(runtime, state)
    if length is None:
        length = _length(runtime, state, active)
    if state.adaptive_length:
        state = state._replace(memory=state.memory._replace(resting=resting(state.adaptive_length, length)))
    edits = step_edits(state)
    with span("draft"):
        drafted = draft(runtime, state, length, edits)
    interval_s = laps.lap("draft")
    if runtime.context.workers.spans is not None and length:
        runtime.context.workers.spans.append(Span("draft", ACCELERATOR, -1, -1, *interval_s))
    after_draft = moved(runtime)
    with span("verify"):
        verified, result, sound, proposal, logprobs = verify(runtime, state, drafted, edits)
    laps.lap("verify")
    after_pass = moved(runtime)
    with span("commit"):
        new_state, accepted, committed = commit(runtime, state, proposal, verified, result, sound, tokenizer)
        new_state = after_drafted(runtime, new_state, drafted, active, accepted, verified.counts)
        new_state = told_logprobs(runtime, new_state, verified, logprobs, committed)
        if runtime.routing is not None:
            new_state = told_routing(runtime.config, new_state, verified.info, verified.prompt_routing, committed)
    laps.lap("commit")
    with span("update draft features"):
        new_state = update_draft_features(runtime, new_state, verified, state.lengths, committed)
    laps.lap("features")
    step_s = agreed(sum(laps.seconds.values())) if runtime.plan.guard else 0.0  # in the warm-up too, where it is compiled
    if state.adaptive_length and active.any():
        adaptive = observe(state.adaptive_length, length, accepted[active], step_s)
        new_state = new_state._replace(adaptive_length=adaptive)
    now = moved(runtime)
    guesses, expert_bytes = drafted.prefetched + verified.info.prefetched, runtime.experts.expert_bytes
    return new_state, StepInfo(
        accepted=accepted,
        committed=committed,
        active=active,
        start=np.array([len(tokens) for tokens in state.generated]),
        context=int(state.lengths[active].sum()),
        drafted=length if drafted.row_lengths is None else drafted.proposal.tokens.shape[1],
        positions=drafted.proposal.tokens.shape[1] + 1,
        row_lengths=drafted.row_lengths,
        draft_moves=moves,
        draft_on_cpu=rows_on_cpu(state),
        verify=verified.info,
        link_bytes=now.link_bytes - before.link_bytes,
        device_link_bytes=now.device_bytes - before.device_bytes,
        draft_link_bytes=after_draft.link_bytes - before.link_bytes,
        merge_bytes=now.link_bytes - after_pass.link_bytes,
        prefetch_bytes=guesses * expert_bytes,
        prefetch_wasted_bytes=(guesses - verified.info.prefetch_hits) * expert_bytes,
        activation_bytes=now.activation_bytes - before.activation_bytes,
        predicted=drafted.predicted,
        below=now.below.since(before.below),
        draft_s=laps.seconds["draft"],
        features_s=laps.seconds["features"],
        verify_s=laps.seconds["verify"],
        commit_s=laps.seconds["commit"],
    )


class Moved(NamedTuple):
    """Expert bytes sent over the link of each device, activation bytes over all, and the counts of the tier below, since a runtime
    was made."""

    device_bytes: np.ndarray
    activation_bytes: int
    below: TierCounts

    @property
    def link_bytes(self) -> int:
        return int(self.device_bytes.sum())


def moved(runtime: Runtime) -> Moved:
    store = runtime.experts.store
    sent = np.array([link.sent_bytes for link in store.links])
    return Moved(sent, runtime.context.activations.sent_bytes, store.tier.counts)


def _length(runtime: Runtime, state: State, active: np.ndarray) -> int:
    """Tokens to draft; none where all rows only join."""
    if not active.any():
        return 0
    return choose(state.adaptive_length) if state.adaptive_length else runtime.plan.draft_length or 0


def warm_up(runtime: Runtime, state: State, *, on_step: Callable[[], object] = lambda: None) -> State:
    """Compiles what the steps will run, by steps of every draft length in which no row is active.

    Such a step routes, fetches and commits nothing; only the buffers move on. Its effect on the adaptive length and the usage
    scores is dropped. on_step: called after each.
    """
    idle = state._replace(statuses=(EMPTY,) * len(state.requests), adaptive_length=None)
    longest = runtime.plan.draft_length or 0
    for length in (longest,) if not (state.adaptive_length or runtime.plan.draft_stop) else compiled_lengths(longest):
        idle, _ = step(runtime, idle, None, length=length)
        on_step()
    return state._replace(
        kv=idle.kv, memory=idle.memory._replace(usage_scores=state.memory.usage_scores), draft_memory=idle.draft_memory
    )


def verify(runtime: Runtime, state: State, drafted: Drafted, edits: LogitEdits | None) -> Verified:
    """One exact pass over [last token, drafted tokens] of every row, and the lossless choice by the edited logits.

    Of a tree, all that comes back is that of the accepted path, as if it alone had been drafted.
    """
    proposal = drafted.proposal
    tokens = np.concatenate([state.last_token[:, None], np.maximum(np.asarray(proposal.tokens), 0)], axis=1)  # [B, T]
    new = tokens.shape[1] if drafted.row_lengths is None else drafted.row_lengths + 1
    num_new = np.where(state.active, new, 0).astype(np.int32)
    before = state._replace(kv=drafted.kv, memory=drafted.memory)
    verified = runtime.flow.run_pass(runtime, before, tokens, num_new, predicted=drafted.predicted, tree=proposal.tree)
    if verified.h is None:
        none = np.zeros(len(num_new), np.int32)
        return Verified(verified, AcceptResult(num_accepted=none, next_token=none), none, proposal)
    logits = stages.head(runtime.config.head, runtime.weights.outer, verified.h)  # [B, T, V]
    edits = pass_edits(runtime, state, edits, proposal)
    edited = logits if edits is None else _edit_logits(logits, edits, _paths(proposal))
    if proposal.tree is not None:
        accepted, chosen = accepted_path(runtime, state, proposal, edited)
        logprobs = path_logprobs(state, proposal, logits, accepted)
        return compact_accepted_path(runtime, state, verified, proposal, accepted, chosen)._replace(logprobs=logprobs)
    chosen = _decide(runtime, state, proposal, edited)
    logprobs = run_logprobs(state, proposal, logits, chosen)
    num_accepted, next_token, sound = np.asarray(chosen)  # jax.device_get takes 0.2 ms longer, in Python
    return Verified(verified, AcceptResult(num_accepted, next_token), sound, proposal, logprobs)


def _paths(proposal: Proposal) -> jax.Array:
    """[B, T, N], the drafted tokens before each position of a pass."""
    return _chain_paths(proposal.tokens) if proposal.tree is None else _tree_paths(proposal.tokens, proposal.tree)


def _decide(runtime: Runtime, state: State, proposal: Proposal, logits) -> jax.Array:
    """See `decided`."""
    given = {"draft_tokens": proposal.tokens, "target_logits": logits}
    if runtime.plan.synthetic_acceptance is not None and proposal.tokens.shape[1]:
        return _synthetic_accept(keys=step_keys(state, Stream.VERIFY), rate=np.float32(runtime.plan.synthetic_acceptance), **given)
    if state.rows.greedy:
        return _accept_greedy(**given)
    if runtime.plan.deterministic_sampling:
        return _accept_coupled(keys=step_coupled_keys(state, logits.shape[1]), rows=state.rows, **given)
    return _accept(keys=step_keys(state, Stream.VERIFY), draft_probs=proposal.probs, params=state.rows, **given)


def commit(
    runtime: Runtime, state: State, proposal: Proposal, verified: TargetPass, result: AcceptResult, sound: np.ndarray, tokenizer
) -> tuple[State, np.ndarray, np.ndarray]:
    """Appends the accepted run and the target's token to each active row, cut where the request ends.

    sound: [B], positions before the first without a distribution; a row that reaches it gets what plain decoding would
    have given it before, and ends with "error". Returns the new state, the drafted tokens accepted [B] and the tokens
    committed [B].
    """
    drafted, rows = np.asarray(proposal.tokens), len(state.requests)
    generated, statuses = list(state.generated), list(state.statuses)
    accepted, committed = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    last_token = state.last_token.copy()
    for row in np.flatnonzero(state.active):
        run = (*drafted[row, : result.num_accepted[row]].tolist(), int(result.next_token[row]))
        request = state.requests[row]
        assert request is not None  # the row is active
        broken, run = len(run) > sound[row], run[: sound[row]]
        generated[row], reason = commit_tokens(request, state.generated[row], run, runtime.config.eos_token_ids, tokenizer)
        if reason is not None or broken:
            statuses[row] = finished(reason or "error")
            if request.grammar is not None:
                request.grammar.forget()
        accepted[row] = min(result.num_accepted[row], sound[row])
        committed[row] = len(generated[row]) - len(state.generated[row])
        if generated[row]:
            last_token[row] = generated[row][-1]
    usage_scores = runtime.policies.draft_set.update(
        verified.memory.usage_scores, verified.counts, _committed_counts(verified, committed)
    )
    new_state = state._replace(
        kv=verified.kv,
        draft_memory=proposal.memory,
        memory=verified.memory._replace(usage_scores=usage_scores),
        lengths=state.lengths + committed,
        last_token=last_token,
        generated=tuple(generated),
        statuses=tuple(statuses),
    )
    return joined(new_state) if new_state.joining.any() else new_state, accepted, committed


def after_drafted(
    runtime: Runtime, state: State, drafted: Drafted, active: np.ndarray, accepted: np.ndarray, counts: np.ndarray
) -> State:
    """What drafts learn of a step. counts: [L, E], choices of its verification."""
    if not active.any():
        return state
    state = state._replace(memory=runtime.draft_executor.after_step(runtime, state.memory, counts))
    if drafted.row_lengths is None:
        return state
    ids = np.array([-1 if request is None else request.id for request in state.requests])
    stops = runtime.plan.stopping.observe(state.row_stops, drafted.row_lengths, accepted, active, ids)
    return state._replace(row_stops=stops)


def update_draft_features(
    runtime: Runtime, state: State, verified: TargetPass, lengths: np.ndarray, committed: np.ndarray
) -> State:
    """Shows a FeatureDraft the target's hidden states of what a step committed or took in.

    state: after the step; lengths: [B], before it.
    """
    memory = state.draft_memory
    if verified.features is None and not verified.prompts:
        return state
    for chunk, features in verified.prompts:
        micro_batch = chunk.micro_batch
        memory = runtime.feature_draft.observe(
            memory, chunk.rows, chunk.following, fetched(features), micro_batch.lengths, micro_batch.num_new
        )
    if verified.features is not None:
        rows, width = len(state.requests), verified.features.shape[1]
        following = np.zeros((rows, width), np.int32)
        for row, count in enumerate(committed):
            following[row, :count] = state.generated[row][len(state.generated[row]) - count :]
        every_row = np.arange(rows, dtype=np.int32)
        memory = runtime.feature_draft.observe(memory, every_row, following, verified.features, lengths, committed)
    return state._replace(draft_memory=jax.block_until_ready(memory))


def _committed_counts(verified: TargetPass, committed: np.ndarray) -> np.ndarray:
    """[L, E] choices of the positions whose tokens were committed."""
    routing = verified.info.routing
    if routing is None:
        return verified.counts
    kept = np.arange(routing.shape[2]) < committed[:, None]  # [B, T]
    return np.stack([count_choices(ids[kept], verified.counts.shape[1]) for ids in routing])
