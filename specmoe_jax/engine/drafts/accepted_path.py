"""The engine's half of drafted trees: the path that verification accepts, and the pass's rows compacted to it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine import cache_rows
from specmoe_jax.engine.drafting import step_coupled_keys, step_keys
from specmoe_jax.engine.flows.protocol import TargetPass
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scoring.logprobs import LogProbs
from specmoe_jax.engine.state import HostKV, State
from specmoe_jax.speculate.sampling import Stream
from specmoe_jax.speculate.trees import accept_tree, accept_tree_coupled, accept_tree_greedy
from specmoe_jax.support.processes import put
from specmoe_jax.types import AcceptedPath, AcceptResult, KVCache, Proposal, RecurrentState

_accept_tree, _accept_tree_coupled, _accept_tree_greedy = (
    functools.partial(jax.jit, static_argnames="depth")(f) for f in (accept_tree, accept_tree_coupled, accept_tree_greedy)
)


class Verified(NamedTuple):
    """What a pass found of a proposal. sound: [B], positions from the first on whose logits give a distribution.

    logprobs: [B, N + 1, ...] of the tokens after each position if the run goes on; None where no request asks.
    """

    target_pass: TargetPass
    result: AcceptResult
    sound: np.ndarray
    proposal: Proposal
    logprobs: LogProbs | None = None


def accepted_path(runtime: Runtime, state: State, proposal: Proposal, logits: jax.Array) -> AcceptedPath:
    """The lossless choice among the paths of a tree. logits [B, T, V]."""
    depth = runtime.plan.draft_length
    assert depth is not None
    if state.rows.greedy:
        return _accept_tree_greedy(proposal.tokens, proposal.tree, logits, depth=depth)
    if runtime.plan.deterministic_sampling:
        keys = step_coupled_keys(state, depth + 1)
        return _accept_tree_coupled(keys, proposal.tokens, proposal.tree, logits, state.rows, depth=depth)
    keys = step_keys(state, Stream.VERIFY)
    return _accept_tree(keys, proposal.tokens, proposal.tree, logits, state.rows, depth=depth)


def compact_accepted_path(
    runtime: Runtime, state: State, verified: TargetPass, proposal: Proposal, accepted: AcceptedPath, finite: jax.Array
) -> Verified:
    """Cache rows, features, routing and tokens of the accepted path in the places of a chain's. -> as step.verify.

    finite: [B, T], nodes whose logits give a distribution.

    The draft's cache needs no such move: it is extended by the target's features of the committed tokens, over its own rows.
    """
    # Of a row that joins in this pass the choice means nothing, but its prompt is already in the cache.
    accepted = accepted._replace(num_accepted=jnp.where(state.active, accepted.num_accepted, 0))
    kv = _compacted(runtime, verified.kv, (jnp.asarray(state.lengths), accepted.path, accepted.num_accepted))
    order = jnp.pad(accepted.path, ((0, 0), (1, 0)))  # the root first
    features = None if verified.features is None else jnp.take_along_axis(verified.features, order[..., None], axis=1)
    (path, num_accepted, next_token), finite, order = jax.device_get((accepted, finite, order))
    told = (verified.info.routing, verified.info.routing_weights)
    routing, weights = (None if one is None else np.take_along_axis(one, order[None, ..., None], axis=2) for one in told)
    sound = np.cumprod(np.take_along_axis(np.asarray(finite), order, axis=1), axis=1).sum(axis=1)
    tokens = np.take_along_axis(np.asarray(proposal.tokens), np.maximum(path - 1, 0), axis=1)
    return Verified(
        verified._replace(kv=kv, features=features, info=verified.info._replace(routing=routing, routing_weights=weights)),
        AcceptResult(num_accepted=num_accepted, next_token=next_token),
        sound,
        proposal._replace(tokens=tokens),
    )


def _compacted(runtime: Runtime, kv: KVCache | HostKV, here: tuple[jax.Array, ...]) -> KVCache | HostKV:
    """The cache rows of the accepted path together. here: lengths, path and number accepted, on the accelerator as all states."""
    there = runtime.cache_tier.beside_cache(runtime, here)
    if isinstance(kv, HostKV):
        table = put(kv.pages.table, runtime.context.host)
        return kv._replace(
            caches=tuple(
                cache_rows.keep_path(cache, *here)
                if isinstance(cache, RecurrentState)
                else cache_rows.keep_path_paged(cache, table, *there)
                for cache in kv.caches
            )
        )
    k = tuple(cache_rows.keep_path(cache, *(here if isinstance(cache, RecurrentState) else there)) for cache in kv.k)
    return kv._replace(k=k, v=tuple(cache if isinstance(cache, tuple) else cache_rows.keep_path(cache, *there) for cache in kv.v))
