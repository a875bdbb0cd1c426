"""Figures on held-out text: bits per byte, expert load, locality of routing."""

import functools
import json
import pathlib
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specmoe_jax.training import data
from specmoe_jax.training.witness import model, sources
from specmoe_jax.training.witness.config import WitnessConfig

ROWS = 8  # of a batch; the last one is filled with rows that do not count


Array = TypeVar("Array", jax.Array, np.ndarray)


class Totals(NamedTuple, Generic[Array]):
    """Sums over evaluated tokens. load [L, E]: choices; shared [L]: choices that the token before made too; mtp_hits: tokens
    after the next that the MTP layer's argmax names; pairs: tokens that have one before them; tokens, nats, num_bytes."""

    nats: Array
    mtp_nats: Array
    mtp_hits: Array
    load: Array
    shared: Array
    pairs: Array
    tokens: Array
    num_bytes: Array


def token_bytes(tokenizer: pathlib.Path) -> np.ndarray:
    """Bytes of text that each id stands for [V]; a byte-level entry has one character a byte, special ones stand for none."""
    document = json.loads(tokenizer.read_text())
    sizes = {index: len(text) for text, index in document["model"]["vocab"].items()}
    sizes |= {token["id"]: 0 for token in document["added_tokens"]}
    return np.array([sizes[i] for i in range(len(sizes))], np.int32)


@functools.partial(jax.jit, static_argnames=("config", "capacity_factor"))
def batch_totals(
    params, bias, inputs, targets, sizes, *, config: WitnessConfig, capacity_factor: float | None
) -> Totals[jax.Array]:
    """inputs, targets [B, T], targets below 0 do not count; sizes [V] bytes of a token."""
    valid = targets >= 0
    following = jnp.maximum(targets, 0)
    hidden, routings = model.hidden_states(params, bias, inputs, config, capacity_factor)
    nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ params.head, following)
    ahead, routing = model.mtp_states(params, bias, hidden[:, :-1], following[:, :-1], config, capacity_factor)
    ahead = ahead @ params.head  # of the targets one further
    mtp_nats = optax.softmax_cross_entropy_with_integer_labels(ahead, following[:, 1:])
    ids = jnp.stack([r.ids.reshape(*inputs.shape, -1) for r in routings])  # [L - 1, B, T, A]
    chosen = jax.nn.one_hot(ids, config.num_experts).sum(axis=-2) * valid[None, :, :, None]  # [L - 1, B, T, E]
    del routing
    return Totals(
        nats=jnp.sum(nats * valid),
        mtp_nats=jnp.sum(mtp_nats * valid[:, 1:]),
        mtp_hits=jnp.sum((jnp.argmax(ahead, axis=-1) == following[:, 1:]) & valid[:, 1:]),
        load=jnp.sum(chosen, axis=(1, 2)),
        shared=jnp.sum(chosen[:, :, 1:] * chosen[:, :, :-1], axis=(1, 2, 3)),
        pairs=jnp.sum(valid[:, 1:]),
        tokens=jnp.sum(valid),
        num_bytes=jnp.sum(sizes[following] * valid),
    )


def corpus_totals(
    params, bias, tokens: np.ndarray, sizes, *, config: WitnessConfig, length: int, capacity_factor=None
) -> Totals[np.ndarray]:
    """Every token but the first of a corpus, in windows of `length` without overlap. tokens [n]."""
    inputs, targets = data.held_out_windows(tokens, length)
    missing = -len(inputs) % ROWS
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    run = functools.partial(batch_totals, params, bias, sizes=sizes, config=config, capacity_factor=capacity_factor)
    parts = [run(i, t) for i, t in zip(np.split(inputs, len(inputs) // ROWS), np.split(targets, len(targets) // ROWS), strict=True)]
    return Totals(*(np.sum([np.asarray(p, np.float64) for p in field], axis=0) for field in zip(*parts, strict=True)))


def add(totals) -> Totals[np.ndarray]:
    return Totals._make(sum(field) for field in zip(*totals, strict=True))


def bits_per_byte(totals: Totals[np.ndarray]) -> float:
    return float(totals.nats / np.log(2) / totals.num_bytes)


def gini(load: np.ndarray) -> float:
    """0 for an even load, towards 1 when one expert has it all."""
    ordered, n = np.sort(load), len(load)
    return float(np.sum((2 * np.arange(1, n + 1) - n - 1) * ordered) / (n * np.sum(ordered)))


def normalised_entropy(load: np.ndarray) -> float:
    """H / log E of the shares of the load: 1 where it is even."""
    share = load / np.sum(load)
    return float(-np.sum(share * np.log(np.maximum(share, 1e-12))) / np.log(len(load)))


def routing_report(totals: Totals, active: int) -> dict:
    """Load and locality per layer. Chance: the overlap of two tokens drawn independently under the same load."""
    share = totals.load / totals.load.sum(axis=1, keepdims=True)  # [L - 1, E]
    overlap, chance = totals.shared / totals.pairs / active, active * np.sum(share**2, axis=1)
    return {
        "gini": [round(gini(row), 3) for row in totals.load],
        "entropy": [round(normalised_entropy(row), 4) for row in totals.load],
        "smallest_share_of_even": [round(float(row.min() * len(row)), 3) for row in share],
        "largest_share_of_even": [round(float(row.max() * len(row)), 3) for row in share],
        "overlap": overlap.round(3).tolist(),
        "overlap_by_chance": chance.round(3).tolist(),
        "overlap_over_chance": (overlap / chance).round(2).tolist(),
    }


def summary(
    params, bias, held_out: dict[str, np.ndarray], sizes, *, config, length: int, limit: int = 0, capacity_factor=None
) -> dict:
    """Bits per byte by corpus, over those of the first model, and over all bytes. `limit`: tokens of a corpus, 0 for all."""
    run = functools.partial(corpus_totals, sizes=sizes, config=config, length=length, capacity_factor=capacity_factor)
    by_corpus = {name: run(params, bias, tokens[: limit or None]) for name, tokens in held_out.items()}
    everything, first = add(by_corpus.values()), [by_corpus[name] for name in sources.FIRST if name in by_corpus]
    overall = {"all": everything} | ({"first": add(first)} if first else {})
    return {
        "bits_per_byte": {name: round(bits_per_byte(t), 4) for name, t in (by_corpus | overall).items()},
        "mtp_nats": round(float(everything.mtp_nats / everything.pairs), 4),
        "mtp_accuracy": round(float(everything.mtp_hits / everything.pairs), 4),
        "bytes_per_token": round(float(everything.num_bytes / everything.tokens), 3),
        "routing": routing_report(everything, config.experts_per_token),
    }
