"""What the routers decided about each request: of the positions that passed the target and were committed, in their order."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine.scheduler import PromptChunk
from specmoe_jax.engine.state import PassInfo, PassRouting, State
from specmoe_jax.types import Routing

Rows = tuple[tuple[PassRouting, ...], ...]


class RequestRouting(NamedTuple):
    """Of one request. ids: [tokens, L, A], uint8 or uint16. weights: [tokens, L, A] float32, None where Engine(routing="ids").

    A position is that of a token that went through the model: the prompt's, the first `prompt_tokens` of them, but for its last
    token; then one for each generated token, of the token before it. The last generated token went through nothing.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    prompt_tokens: int


def pass_routing(routed: Sequence[Routing], shape: tuple[int, int], detail: str | None) -> PassRouting:
    """Of a pass over [B, T] positions; waits for it. routed: by each layer with experts, [n, A]. detail: see Runtime.routing."""
    told = [(routing.ids, routing.weights) if detail == "weights" else (routing.ids,) for routing in routed]
    ids, *weights = zip(*jax.device_get(told), strict=True)
    return PassRouting(*(np.stack(arrays).reshape(len(routed), *shape, -1) for arrays in (ids, *weights)))


def with_routing(rows: Rows, at: np.ndarray, routing: PassRouting, counts: np.ndarray, config: ModelConfig) -> Rows:
    """With the first counts[b] positions of each row at[b] (-1 for padding) of a pass behind what the row has."""
    grown, dtype = list(rows), np.uint8 if config.num_experts <= 256 else np.uint16
    for b, row in enumerate(at.tolist()):
        if row >= 0 and counts[b]:
            ids, weights = (None if told is None else told[:, b, : counts[b]].swapaxes(0, 1) for told in routing)
            assert ids is not None
            grown[row] += (PassRouting(ids.astype(dtype), None if weights is None else weights.copy()),)
    return tuple(grown)


def told_routing(
    config: ModelConfig, state: State, info: PassInfo, prompts: Sequence[tuple[PromptChunk, PassRouting]], committed: np.ndarray
) -> State:
    """The state after a step with the routing of what it committed [B], and of the prompts that it read."""
    rows = state.routing
    for chunk, routing in prompts:
        rows = with_routing(rows, chunk.rows, routing, chunk.micro_batch.num_new, config)
    if (told := routing_of(info)) is not None:
        rows = with_routing(rows, np.arange(len(committed)), told, committed, config)
    return state._replace(routing=rows)


def routing_of(info: PassInfo) -> PassRouting | None:
    """What a pass tells."""
    return None if info.routing is None else PassRouting(info.routing, info.routing_weights)


def request_routing(pieces: tuple[PassRouting, ...], tokens: int, config: ModelConfig) -> RequestRouting:
    """Of a row that generated so many tokens."""
    if not pieces:
        shape = (0, config.num_moe_layers, config.experts_per_token)
        return RequestRouting(np.zeros(shape, np.uint8), None, 0)
    ids = np.concatenate([piece.ids for piece in pieces])
    weights = [piece.weights for piece in pieces if piece.weights is not None]
    return RequestRouting(ids, np.concatenate(weights) if weights else None, len(ids) - tokens)
