"""Figures of a trained model on the held-out text: bits per byte, expert load, self-draft acceptance."""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.support.statistics import gini
from specmoe_jax.training import data, loop, model, self_draft

BATCH_ROWS = 16
DRAFT_LENGTH = 4
CHAIN_STRIDE = 8  # positions between two chains of a row


class RoutingTotals(NamedTuple):
    """Sums over evaluated tokens. load [L, E]: choices; overlap [L]: shared choices of neighbours; pairs: neighbours."""

    load: np.ndarray
    overlap: np.ndarray
    pairs: int


@functools.partial(jax.jit, static_argnames="config")
def evaluate_batch(params: model.Params, inputs: jax.Array, targets: jax.Array, config: ModelConfig):
    """inputs, targets [B, T], targets < 0 ignored -> nats, load [L, E], overlap [L] (sums over valid positions)."""
    logits, traces = model.forward(params, inputs, config)
    valid = targets >= 0
    nats = jnp.sum(jnp.where(valid, loop.token_losses(logits, jnp.maximum(targets, 0)), 0.0))
    ids = jnp.stack([t.ids.reshape(*inputs.shape, -1) for t in traces])  # [L, B, T, A]
    chosen = jax.nn.one_hot(ids, config.num_experts).sum(axis=-2) * valid[None, :, :, None]  # [L, B, T, E]
    overlap = jnp.sum(chosen[:, :, 1:] * chosen[:, :, :-1], axis=(1, 2, 3))
    return nats, jnp.sum(chosen, axis=(1, 2)), overlap


def padded_batches(inputs: np.ndarray, targets: np.ndarray):
    """Batches of BATCH_ROWS rows; the last one is filled with rows that do not count."""
    missing = -len(inputs) % BATCH_ROWS
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    return zip(np.split(inputs, len(inputs) // BATCH_ROWS), np.split(targets, len(targets) // BATCH_ROWS), strict=True)


def evaluate_corpus(params: model.Params, tokens: np.ndarray, config: ModelConfig, length: int):
    """tokens [n] -> (nats over all of them but the first, RoutingTotals)."""
    inputs, targets = data.held_out_windows(tokens, length)
    results = [evaluate_batch(params, i, t, config) for i, t in padded_batches(inputs, targets)]
    nats, load, overlap = (np.sum([np.asarray(r[k], np.float64) for r in results], axis=0) for k in range(3))
    pairs = int(np.sum((targets[:, 1:] >= 0) & (targets[:, :-1] >= 0)))
    return float(nats), RoutingTotals(load=load, overlap=overlap, pairs=pairs)


def entropy_skewness(load: np.ndarray) -> float:
    """1 - H / log E of the shares of the load."""
    share = load / np.sum(load)
    return float(1 + np.sum(share * np.log(np.maximum(share, 1e-12))) / np.log(len(load)))


def routing_report(totals: RoutingTotals, active: int) -> dict:
    """Load and locality per layer. Chance is the overlap of two tokens drawn independently under the same load."""
    share = totals.load / totals.load.sum(axis=1, keepdims=True)  # [L, E]
    return {
        "load_share": share.round(4).tolist(),
        "gini": [round(float(value), 3) for value in gini(totals.load)],
        "entropy_skewness": [round(entropy_skewness(row), 4) for row in totals.load],
        "overlap": (totals.overlap / totals.pairs / active).round(3).tolist(),
        "overlap_by_chance": (active * np.sum(share**2, axis=1)).round(3).tolist(),
        "smallest_share": float(share.min()),
    }


def chain_attention(
    x: jax.Array, positions: jax.Array, layer: model.LayerParams, config: ModelConfig, *, context, chain, starts: jax.Array
):
    """One more row of P chains a sequence: it sees the target's rows before its start and its own chain.

    x [B, P, M]; positions, starts [P]; context (k, v) [B, S, K, D]; chain (k, v) [B, P, i, K, D]
    -> [B, P, M], chain with this row [B, P, i + 1, K, D].
    """
    q, k, v = model.project_qkv(x, positions, layer, config)
    q = q * config.head_dim**-0.5
    chain = tuple(jnp.concatenate([old, new[:, :, None]], axis=2) for old, new in zip(chain, (k, v), strict=True))
    before = jnp.arange(context[0].shape[1]) < starts[:, None]  # [P, S]
    far = jnp.where(before, jnp.einsum("bpkgd,bskd->bkgps", q, context[0]), -jnp.inf)
    near = jnp.einsum("bpkgd,bpikd->bkgpi", q, chain[0])
    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1)
    split = far.shape[-1]
    out = jnp.einsum("bkgps,bskd->bpkgd", weights[..., :split], context[1]) + jnp.einsum(
        "bkgpi,bpikd->bpkgd", weights[..., split:], chain[1]
    )
    return out.reshape(*x.shape[:-1], -1) @ layer.wo, chain


def chain_row(params: model.Params, tokens: jax.Array, step: int, config: ModelConfig, *, traces, chains, starts, tables):
    """Greedy next tokens of P chains a sequence. tokens [B, P]; tables [L, P, E] stand-ins -> [B, P], chains."""
    x = params.embedding[tokens]
    grown = []
    for layer, trace, chain, table in zip(params.layers, traces, chains, tables, strict=True):
        h = model.rms_norm(x, layer.attention_norm, config.norm_eps)
        out, chain = chain_attention(h, starts + step, layer, config, context=(trace.k, trace.v), chain=chain, starts=starts)
        x = x + out
        h = model.rms_norm(x, layer.expert_norm, config.norm_eps).reshape(-1, config.hidden_size)
        ids, weights, _ = model.route(h, layer.gate, config.experts_per_token)
        used = jnp.take_along_axis(table[None], ids.reshape(*tokens.shape, -1), axis=-1)
        x = x + model.dense_ffn(h, used.reshape(ids.shape), weights, model.merged(layer)).reshape(x.shape)
        grown.append(chain)
    return jnp.argmax(model.rms_norm(x, params.norm, config.norm_eps) @ params.head, axis=-1), grown


def run_chains(
    params: model.Params,
    tokens: jax.Array,
    starts: jax.Array,
    config: ModelConfig,
    *,
    traces,
    tables,
    forced: jax.Array | None = None,
) -> jax.Array:
    """The greedy continuations of DRAFT_LENGTH tokens -> [B, P, N]; `forced` [B, P, N] are fed in their stead."""
    shape = (*tokens[:, starts].shape, 0, config.num_kv_heads, config.head_dim)
    chains = [(jnp.zeros(shape), jnp.zeros(shape))] * config.num_layers
    current, out = tokens[:, starts], []
    for step in range(DRAFT_LENGTH):
        predicted, chains = chain_row(params, current, step, config, traces=traces, chains=chains, starts=starts, tables=tables)
        out.append(predicted)
        current = predicted if forced is None else forced[..., step]
    return jnp.stack(out, axis=-1)


def hot_tables(params: model.Params, traces, starts: jax.Array, batch: int, num_resident: int, num_experts: int):
    """HotTemporal: residents are the top choices of the whole batch over the last DRAFT_LENGTH + 1 positions.

    -> stand-ins [L, P, E] for chains that start at `starts` [P].
    """
    window = starts[:, None] - jnp.arange(1, DRAFT_LENGTH + 2)  # [P, N + 1]
    tables = []
    for layer, trace in zip(params.layers, traces, strict=True):
        chosen = trace.ids.reshape(batch, -1, trace.ids.shape[-1])[:, window]  # [B, P, N + 1, A]
        counts = jnp.sum(self_draft.choice_counts(chosen, num_experts), axis=0)  # [P, E]
        distances = self_draft.expert_distances(model.merged(layer))
        tables.append(self_draft.stand_ins(self_draft.hottest(counts, num_resident), distances))
    return jnp.stack(tables)


@functools.partial(jax.jit, static_argnames="config")
def chain_acceptance(params: model.Params, tokens: jax.Array, config: ModelConfig, num_resident: int) -> jax.Array:
    """Drafts and verifies chains all along held-out rows. tokens [B, T] -> accepted prefix flags [B, P, N]."""
    _, traces = model.forward(params, tokens, config)
    starts = jnp.arange(4 * CHAIN_STRIDE, tokens.shape[1], CHAIN_STRIDE)
    tables = hot_tables(params, traces, starts, len(tokens), num_resident, config.num_experts)
    native = jnp.broadcast_to(jnp.arange(config.num_experts), tables.shape)
    drafted = run_chains(params, tokens, starts, config, traces=traces, tables=tables)
    target = run_chains(params, tokens, starts, config, traces=traces, tables=native, forced=drafted)
    return jnp.cumprod(drafted == target, axis=-1)


def acceptance_report(params: model.Params, rows: np.ndarray, config: ModelConfig, num_resident: int) -> dict:
    """rows [n, T], mixed corpora. by_position[i]: rate of token i given that those before it were accepted."""
    flags = np.concatenate(
        [
            np.asarray(chain_acceptance(params, rows[i : i + BATCH_ROWS], config, num_resident))
            for i in range(0, len(rows) - BATCH_ROWS + 1, BATCH_ROWS)
        ]
    )
    accepted = flags.reshape(-1, DRAFT_LENGTH).sum(axis=0)
    reached = np.concatenate([[flags.size // DRAFT_LENGTH], accepted[:-1]])
    return {
        "by_position": (accepted / np.maximum(reached, 1)).round(3).tolist(),
        "per_drafted_token_reached": round(float(accepted.sum() / reached.sum()), 3),
        "tokens_per_step": round(float(1 + accepted.sum() / reached[0]), 3),
        "chains": int(reached[0]),
    }


def full_report(
    params: model.Params, config: ModelConfig, data_dir: pathlib.Path, *, length: int, limit: int, draft_rows: int = 128
) -> dict:
    """Every figure of the model card. `limit`: held-out tokens per corpus, 0 for all."""
    corpus = json.loads((data_dir / "corpus.json").read_text())
    report, windows, totals, all_nats, all_bytes = {"bits_per_byte": {}}, [], [], 0.0, 0.0
    for name in corpus:
        tokens = np.load(data_dir / "held_out" / f"{name}.npy")
        used = tokens[: limit or None]
        nats, total = evaluate_corpus(params, used, config, length)
        # A part of a corpus counts its share of the bytes.
        num_bytes = corpus[name]["held_out_bytes"] * len(used) / len(tokens)
        report["bits_per_byte"][name] = round(nats / np.log(2) / num_bytes, 4)
        all_nats, all_bytes = all_nats + nats, all_bytes + num_bytes
        totals.append(total)
        windows.append(data.held_out_windows(tokens, length)[0][:-1])
    report["bits_per_byte"]["all"] = round(all_nats / np.log(2) / all_bytes, 4)
    report["routing"] = routing_report(RoutingTotals._make(sum(t) for t in zip(*totals, strict=True)), config.experts_per_token)
    rows = np.random.default_rng(0).permutation(np.concatenate(windows))[:draft_rows]
    report["self_draft"] = {n: acceptance_report(params, rows, config, n) for n in loop.DRAFT_SIZES}
    return report
