"""The target's hidden states of given texts: every text is read once, many at a time."""

import operator
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine import stages
from specmoe_jax.engine.flows.layer_passes import fetched
from specmoe_jax.engine.flows.protocol import ExpertFlowExecutor, ReadStates
from specmoe_jax.engine.requests.prepare import Reader, make_requests
from specmoe_jax.engine.scoring.layout import ReadRow
from specmoe_jax.engine.scoring.score import read_shape
from specmoe_jax.engine.scoring.texts import Text
from specmoe_jax.engine.session import Session
from specmoe_jax.support.errors import RequestError


class Features(NamedTuple):
    """Of one text. token_ids: its n tokens. hidden: [layers, n, M] in the model's dtype, in the order that was asked for."""

    token_ids: tuple[int, ...]
    hidden: np.ndarray


def checked_layers(config: ModelConfig, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Raises RequestError."""
    if config.encoder is not None:
        raise RequestError("features of an encoder-decoder are not built; use a decoder")
    if layers is None:
        return (config.num_layers,)
    try:
        wanted = tuple(operator.index(layer) for layer in layers)
    except TypeError as e:
        raise RequestError(f"layers is {str(layers)[:50]} ({e}); give whole numbers") from e
    if not wanted or len(set(wanted)) < len(wanted) or not all(0 <= layer <= config.num_layers for layer in wanted):
        raise RequestError(
            f"layers is {list(wanted)}; give different ones of 0 (embeddings) to {config.num_layers} (after the norm)"
        )
    return wanted


def feature_texts(model: Reader, texts: Sequence[Text]) -> list[tuple[int, ...]]:
    """Token ids of the texts, checked as prompts are. Raises RequestError."""
    return [request.token_ids for request in make_requests(model, texts, None)]


def features_of(
    session: Session, flow: ExpertFlowExecutor, texts: Sequence[tuple[int, ...]], layers: tuple[int, ...]
) -> Generator[Features, None, None]:
    """In the order of the texts. layers: of `checked_layers`."""
    config, rows = session.model.config, [ReadRow(chain=tokens) for tokens in texts]
    watched = tuple(sorted(layer for layer in layers if layer < config.num_layers))
    found: dict[int, np.ndarray] = {}
    missing, following = [len(tokens) for tokens in texts], 0
    for states in flow.read(session, rows, read_shape(config, session.plan, rows), watched):
        values = _states(session, states, watched, layers)  # [b, T, layers, M]
        one = states.read_pass
        for b in np.flatnonzero(one.rows >= 0).tolist():
            row, first, count = int(one.rows[b]), int(one.lengths[b]), int(one.num_new[b])
            if row not in found:
                found[row] = np.empty((len(layers), len(texts[row]), config.hidden_size), values.dtype)
            found[row][:, first : first + count] = values[b, :count].swapaxes(0, 1)
            missing[row] -= count
        while following < len(texts) and not missing[following]:
            yield Features(texts[following], found.pop(following))
            following += 1


def _states(session: Session, states: ReadStates, watched: tuple[int, ...], layers: tuple[int, ...]) -> np.ndarray:
    """[b, T, layers, M] of a pass, on the host."""
    config, runtime = session.model.config, session.resources.runtime
    assert runtime is not None  # of the pass
    found: dict[int, np.ndarray] = {}
    if states.inputs is not None:
        found |= dict(zip(watched, np.split(np.asarray(jax.device_get(states.inputs)), len(watched), axis=-1), strict=True))
    if config.num_layers in layers:
        found[config.num_layers] = np.asarray(stages.final_norm(config.head, runtime.weights, fetched(states.h)))
    return np.stack([found[layer] for layer in layers], axis=2)
