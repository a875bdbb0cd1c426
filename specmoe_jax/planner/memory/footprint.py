"""Bytes of a model's caches and activations: of a position, a pass, an encoder, staged prompts."""

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.kv_cache.positions import PREFILL_TOKENS, prefill_rows, staged_positions
from specmoe_jax.models.selection.attention import QUERIES
from specmoe_jax.models.selection.indexer import BLOCK, selects


def _cache_row(layer: LayerConfig) -> int:
    """Numbers that one position of one row takes in the key cache of a layer, and again in its value cache."""
    return layer.attention.cache_row


def position_bytes(config: ModelConfig, itemsize: int) -> int:
    """Keys and values of one position of one row, in all layers."""
    return 2 * sum(map(_cache_row, config.layers)) * itemsize


def state_bytes(config: ModelConfig, rows: int, replayed: int) -> int:
    """States of the recurrent layers, with the rows of positions that may be rolled back; those of one layer twice, in a pass."""
    each = [
        recurrence.state + recurrence.kept_rows(replayed) * recurrence.row
        for layer in config.layers
        if (recurrence := layer.attention.recurrent) is not None
    ]
    return rows * (sum(each) + max(each, default=0)) * 4  # float32


def activation_bytes(config: ModelConfig, plan: Plan, batch_rows: int, passes: int, itemsize: int, *, own: int) -> int:
    """Largest live activations: residual, expert inputs and outputs of a pass, and the logits of a verification.

    passes: tokens of the largest pass. own: those of them that a device attends; the experts' inputs and outputs are of all.
    """
    heads = max(token_numbers(layer) * itemsize + _recurrent_bytes(layer) for layer in config.layers)
    attended, inputs = config.state_numbers * itemsize + heads, config.state_numbers * itemsize
    outputs = config.experts_per_token * config.hidden_size * 4
    logits = batch_rows * plan.tokens_per_pass * config.vocab_size * 4
    return own * attended + passes * (inputs + outputs) + logits


def attention_bytes(config: ModelConfig, rows: int, tokens: int, positions: int, itemsize: int) -> int:
    """What attention in jnp holds beside the cache, of `tokens` new ones a row: scores in float32 and weights, or weights and V.

    XLA masks V into a copy of its own (a row that nobody attends may hold anything); as compiled for an H200.
    """
    most = 0
    for layer in config.layers:
        if layer.attention.recurrent is not None:
            continue
        if selects(layer.attention, positions):
            most = max(most, _selection_bytes(layer.attention, rows, tokens, positions, itemsize))
            continue
        scores, values = rows * tokens * layer.attention.num_heads * positions, rows * positions * _cache_row(layer)
        most = max(most, (4 + itemsize) * scores, itemsize * (scores + values))
    return most


def _selection_bytes(attention: AttentionConfig, rows: int, tokens: int, positions: int, itemsize: int) -> int:
    """Scores of an indexer, masked and sorted, in float32; the keys and values of what some queries chose, and their scores.

    Where an earlier layer's choice is taken, without the former. From the shapes, not as compiled.
    """
    kept = attention.kept or 0
    each = 2 * attention.cache_dim * itemsize + attention.num_heads * (4 + itemsize)
    scores = 0 if attention.indexer is None else 3 * positions + attention.indexer.heads * min(positions, BLOCK)
    return rows * tokens * (scores + 2 * kept) * 4 + rows * min(tokens, QUERIES) * kept * each


def staging_bytes(config: ModelConfig, plan: Plan, batch_rows: int, positions: int, itemsize: int) -> int:
    """Of the longest prompts at the plan's chunk; shorter chunks are of prompts that are one chunk."""
    if plan.prefill_attention != "accelerator":
        return 0
    tokens = prefill_rows(batch_rows, plan.prefill_chunk) * staged_positions(positions, plan.prefill_chunk)
    return 2 * max(tokens, PREFILL_TOKENS) * max(map(_cache_row, config.layers)) * itemsize


def cross_row(layer: LayerConfig) -> int:
    """As _cache_row, for the encoder's output."""
    return 0 if layer.cross is None else layer.cross.num_kv_heads * layer.cross.head_dim


def encoder_bytes(config: ModelConfig, batch_rows: int, positions: int, itemsize: int) -> int:
    """Largest live activations of the encoder: as of a pass, and scores in full (twice: themselves and their softmax)."""
    if config.encoder is None:
        return 0
    heads = max(layer.attention.num_heads for layer in config.encoder.layers)
    width = max(token_numbers(layer) for layer in config.encoder.layers)
    per_token = (2 * config.hidden_size + width) * itemsize + config.experts_per_token * config.hidden_size * 4
    return batch_rows * positions * (per_token + 2 * heads * positions * 4)


def token_numbers(layer: LayerConfig) -> int:
    """Numbers of the queries, keys and values of one token; none where the layer is recurrent."""
    attention = layer.attention
    gates = attention.num_heads * (attention.query_dim - attention.head_dim)  # and what is asked of an indexer
    gates += attention.told_numbers
    return 0 if attention.recurrent else (attention.num_heads + 2 * attention.num_kv_heads) * attention.cache_dim + gates


def _recurrent_bytes(layer: LayerConfig) -> int:
    """Of one token in a recurrent layer, float32: what is projected, convolved and split by heads, and outputs with their gates."""
    recurrence = layer.attention.recurrent
    return 0 if recurrence is None else 4 * (3 * recurrence.row + 4 * recurrence.value_heads * recurrence.value)
