"""The engine's half of drafted trees: the path that verification accepts, and the pass's rows compacted to it."""

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
from specmoe_jax.speculate.trees import accept_tree, accept_tree_coupled, accept_tree_greedy, decided_path, from_root
from specmoe_jax.support.processes import put
from specmoe_jax.types import AcceptedPath, AcceptResult, KVCache, Proposal, RecurrentState

_accept_tree, _accept_tree_coupled, _accept_tree_greedy = map(decided_path, (accept_tree, accept_tree_coupled, accept_tree_greedy))


class Verified(NamedTuple):
    """What a pass found of a proposal. sound: [B], positions from the first on whose logits give a distribution.

    logprobs: [B, N + 1, ...] of the tokens after each position if the run goes on; None where no request asks.
    """

    target_pass: TargetPass
    result: AcceptResult
    sound: np.ndarray
    proposal: Proposal
    logprobs: LogProbs | None = None


def accepted_path(runtime: Runtime, state: State, proposal: Proposal, logits: jax.Array) -> tuple[AcceptedPath, jax.Array]:
    """The lossless choice among the paths of a tree, and what the host reads of it: see trees.decided_path. logits [B, T, V].

    Of a row that joins in this pass the choice means nothing, but its prompt is already in the cache.
    """
    given = {"tokens": proposal.tokens, "tree": proposal.tree, "logits": logits, "active": state.active}
    depth = runtime.plan.draft_length
    if state.rows.greedy:
        return _accept_tree_greedy(depth=depth, **given)
    if runtime.plan.deterministic_sampling:
        assert depth is not None
        return _accept_tree_coupled(keys=step_coupled_keys(state, depth + 1), rows=state.rows, depth=depth, **given)
    return _accept_tree(keys=step_keys(state, Stream.VERIFY), rows=state.rows, depth=depth, **given)


def compact_accepted_path(
    runtime: Runtime, state: State, verified: TargetPass, proposal: Proposal, accepted: AcceptedPath, decided: jax.Array
) -> Verified:
    """Cache rows, features, routing and tokens of the accepted path in the places of a chain's. -> as step.verify.

    The draft's cache needs no such move: it is extended by the target's features of the committed tokens, over its own rows.
    """
    kv = _compacted(runtime, verified.kv, (jnp.asarray(state.lengths), accepted.path, accepted.num_accepted))
    features = None if verified.features is None else _along(verified.features, accepted.path)
    *nodes, num_accepted, next_token, sound = np.asarray(decided).T
    path = np.stack(nodes, axis=1)  # [B, depth]
    order = np.pad(path, ((0, 0), (1, 0)))
    told = (verified.info.routing, verified.info.routing_weights)
    routing, weights = (None if one is None else np.take_along_axis(one, order[None, ..., None], axis=2) for one in told)
    tokens = np.take_along_axis(np.asarray(proposal.tokens), np.maximum(path - 1, 0), axis=1)
    return Verified(
        verified._replace(kv=kv, features=features, info=verified.info._replace(routing=routing, routing_weights=weights)),
        AcceptResult(num_accepted=num_accepted, next_token=next_token),
        sound,
        proposal._replace(tokens=tokens),
    )


@jax.jit
def _along(features: jax.Array, path: jax.Array) -> jax.Array:
    """Features [B, T, ...] of a path's nodes, the root first."""
    return jnp.take_along_axis(features, from_root(path)[..., None], axis=1)


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
