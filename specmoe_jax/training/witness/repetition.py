"""Training against repetition: the model continues training text, and what it says again is made less likely.

Sequence-level unlikelihood (Welleck et al. 2020, arXiv:1908.04319, section 5.2), on continuations drawn each few steps from the
weights of that moment. Ours: only a token that begins a word is made less likely. Pushed away inside a word, a model of this size
escapes into words that do not exist.
"""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.training.witness import model, rollouts
from specmoe_jax.training.witness.config import RecipeConfig, WitnessConfig

SAMPLED_AT = 0.8  # temperature of the continuations that are not greedy
CAPACITY_FACTOR = 2.0  # rows of an expert, relative to an even load, which loops are far from


def completes_repeat(tokens: jax.Array, size: int) -> jax.Array:
    """Where a token ends `size` tokens that stand in its row before already. tokens [B, S] -> [B, S] bool."""
    length = tokens.shape[1]
    same = tokens[:, :, None] == tokens[:, None, :]  # [B, t, s]
    ends = jnp.tril(jnp.ones((length, length), bool), -1)
    for back in range(size):
        shifted = jnp.pad(same, ((0, 0), (back, 0), (back, 0)))[:, :length, :length]  # [b, t, s] is same[b, t - back, s - back]
        ends = ends & shifted
    return jnp.any(ends, axis=2)


def may_differ(begins_word: jax.Array, size: int) -> jax.Array:
    """Where a text may turn away from what it said before: at the beginning of a word, and inside one of `size` tokens and more,
    or a loop without words would cost nothing. begins_word [B, S] bool -> [B, S] bool."""
    begun = jnp.cumsum(begins_word, axis=1)
    before = jnp.pad(begun, ((0, 0), (size, 0)))[:, :-size]
    return begins_word | (begun == before)


def unlikelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log(1 - p) of each token in nats. logits [..., V], tokens [...] int32 -> [...]."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], -jnp.inf, logits)
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(others, axis=-1)


def continuations(
    params: model.Params, bias: jax.Array, prompts: np.ndarray, key: jax.Array, config: WitnessConfig, recipe: RecipeConfig
):
    """Training text and what the model says after it; the key is consumed.

    prompts [n, repeat_prompt] int32 -> [n, repeat_prompt + repeat_tokens] int32; each 1 / repeat_sampled-th row is sampled.
    """
    rows, size = prompts.shape
    sampled = np.diff(np.floor(np.arange(rows + 1) * recipe.repeat_sampled)) > 0  # evenly among the rows
    temperatures = jnp.asarray(np.where(sampled, SAMPLED_AT, 0.0), jnp.float32)
    padded = np.pad(prompts, ((0, 0), (0, recipe.repeat_tokens)))
    lengths = jnp.full(rows, size)
    drawn = rollouts.continued(params, bias, padded, lengths, key, temperatures, config=config, count=recipe.repeat_tokens)
    return jnp.concatenate([prompts, drawn], axis=1)


def loss_fn(
    params: model.Params,
    bias: jax.Array,
    tokens: jax.Array,
    word_starts: jax.Array,
    config: WitnessConfig,
    recipe: RecipeConfig,
):
    """tokens [R, S] of `continuations`; word_starts [V] bool -> mean over continued tokens of -log(1 - p) where a token that may
    differ completes a repeat and 0 elsewhere, and the share of tokens that complete one."""
    hidden, _ = model.hidden_states(params, bias, tokens[:, :-1], config, CAPACITY_FACTOR)
    start = recipe.repeat_prompt
    repeats = completes_repeat(tokens, recipe.repeat_size)[:, start:]
    unlikely = repeats & may_differ(word_starts[tokens], recipe.repeat_size)[:, start:]
    nats = unlikelihood(hidden[:, start - 1 :] @ params.head, tokens[:, start:])
    return jnp.mean(jnp.where(unlikely, nats, 0.0)), jnp.mean(repeats)
