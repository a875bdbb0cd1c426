"""What is done to logits before they are a distribution, the same to a draft's rows and to the target's.

Verification decides by the edited logits alone and a draft draws from its own edited ones, so acceptance is lossless whatever the
edit: only that a position's edit is a function of the tokens before it matters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.types import Tree


class EditKinds(NamedTuple):
    """Which edits any request of a job asks for, so that one program serves all its steps.

    biases: entries of the largest logit_bias and ban list, a power of two. processors: the different functions. grammars: whether
    an answer must be what a JSON schema or a regular expression says.
    """

    penalties: bool = False
    biases: int = 0
    processors: tuple[Callable, ...] = ()
    grammars: bool = False


class Penalties(NamedTuple):
    """repetition, presence, frequency: [B] float32; prompts: [B] int32, tokens of the history that are the prompt's."""

    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    prompts: np.ndarray


class Biases(NamedTuple):
    """tokens: [B, K] int32, -1 for none. amounts: [B, K] float32, added to their logits; -inf bans."""

    tokens: np.ndarray
    amounts: np.ndarray


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Processors:
    """The different functions of a job's requests: part of a program, not of what it is given."""

    functions: tuple[Callable, ...] = ()


class LogitEdits(NamedTuple):
    """Of the rows of a batch; a part that no request of the job asks for is None.

    history: [B, S] int32, prompt and answer so far, -1 beyond. lengths: [B] int32, tokens in it. processor: [B] int32, which of the
    functions a row has, -1 for none. masks: [B, T, W] int32, the tokens that the grammars allow at each position, 32 to a word;
    whoever edits puts them in, since they depend on what was drafted.
    """

    penalties: Penalties | None
    biases: Biases | None
    history: np.ndarray | None
    lengths: np.ndarray | None
    processor: np.ndarray | None
    processors: Processors
    masks: np.ndarray | None = None


def edit_kinds(params: Sequence[SamplingParams]) -> EditKinds | None:
    """None where nothing is asked for."""
    most = max((len(p.bias_pairs) + len(p.banned_tokens) for p in params), default=0)
    kinds = EditKinds(
        penalties=any(p.penalised for p in params),
        biases=most and 1 << (most - 1).bit_length(),
        processors=tuple(dict.fromkeys(p.logits_processor for p in params if p.logits_processor is not None)),
        grammars=any(p.grammar is not None for p in params),
    )
    return None if kinds == EditKinds() else kinds


def logit_edits(
    kinds: EditKinds, params: Sequence[SamplingParams], histories: Sequence[Sequence[int]], prompts: Sequence[int], positions: int
) -> LogitEdits:
    """Of B rows. histories: prompt and answer so far. prompts: how many of them are the prompt's. positions: S, of all of them."""
    history = None
    if kinds.penalties or kinds.processors:
        history = np.full((len(params), positions), -1, np.int32)
        for row, tokens in enumerate(histories):
            history[row, : len(tokens)] = tokens
    return LogitEdits(
        penalties=_penalties(params, prompts) if kinds.penalties else None,
        biases=_biases(params, kinds.biases) if kinds.biases else None,
        history=history,
        lengths=None if history is None else np.array([len(tokens) for tokens in histories], np.int32),
        processor=_processor(params, kinds) if kinds.processors else None,
        processors=Processors(kinds.processors),
    )


def _penalties(params: Sequence[SamplingParams], prompts: Sequence[int]) -> Penalties:
    def column(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], np.float32)

    return Penalties(
        repetition=column("repetition_penalty"),
        presence=column("presence_penalty"),
        frequency=column("frequency_penalty"),
        prompts=np.array(prompts, np.int32),
    )


def _biases(params: Sequence[SamplingParams], count: int) -> Biases:
    tokens, amounts = np.full((len(params), count), -1, np.int32), np.zeros((len(params), count), np.float32)
    for row, p in enumerate(params):
        pairs = (*p.bias_pairs, *((token, -np.inf) for token in p.banned_tokens))
        for i, (token, amount) in enumerate(pairs):
            tokens[row, i], amounts[row, i] = token, amount
    return Biases(tokens, amounts)


def _processor(params: Sequence[SamplingParams], kinds: EditKinds) -> np.ndarray:
    found = (-1 if p.logits_processor is None else kinds.processors.index(p.logits_processor) for p in params)
    return np.fromiter(found, np.int32, len(params))


def chain_paths(tokens: jax.Array) -> jax.Array:
    """The drafted tokens before each position of a pass: tokens [B, N] -> [B, N + 1, N], -1 beyond.

    >>> chain_paths(jnp.array([[7, 8]])).tolist()
    [[[-1, -1], [7, -1], [7, 8]]]
    """
    count = tokens.shape[1]
    before = jnp.arange(count) < jnp.arange(count + 1)[:, None]
    return jnp.where(before, tokens[:, None], -1)


def tree_paths(tokens: jax.Array, tree: Tree) -> jax.Array:
    """As `chain_paths`, of a tree's nodes: their ancestors' tokens and their own. tokens: [B, N], of the nodes after the root."""
    depth = jnp.arange(1, tokens.shape[1] + 1)
    above = tree.mask[:, :, 1:, None] & (tree.depths[:, None, 1:, None] == depth)  # [B, T, N, depth]
    return jnp.max(jnp.where(above, tokens[:, None, :, None], -1), axis=2)


def edit_logits(logits: jax.Array, edits: LogitEdits, paths: jax.Array) -> jax.Array:
    """logits: [B, T, V]; paths: [B, T, D] int32, the drafted tokens before each position, -1 beyond -> [B, T, V] float32."""
    logits = logits.astype(jnp.float32)
    if edits.biases is not None:
        rows, nothing = jnp.arange(len(logits))[:, None], jnp.zeros((len(logits), logits.shape[-1]))
        added = nothing.at[rows, _dropped(edits.biases.tokens)].add(edits.biases.amounts, mode="drop")
        logits = logits + added[:, None]
    if edits.penalties is not None:
        logits = _penalised(logits, edits, paths)
    if edits.processors.functions:
        logits = _processed(logits, edits, paths)
    if edits.masks is not None:
        logits = jnp.where(_unpacked(edits.masks, logits.shape[-1]), logits, -jnp.inf)
    return logits


def _unpacked(masks, count: int) -> jax.Array:
    """[..., W] int32 -> [..., count] bool, the lowest bit of a word first."""
    bits = jnp.right_shift(jnp.asarray(masks)[..., None], jnp.arange(32, dtype=jnp.int32)) & 1
    return bits.reshape(*bits.shape[:-2], -1)[..., :count].astype(bool)


def _dropped(tokens) -> jax.Array:
    """Indices that a scatter drops in the place of -1, which would be the last one."""
    return jnp.where(jnp.asarray(tokens) < 0, jnp.iinfo(jnp.int32).max, tokens)


def _penalised(logits: jax.Array, edits: LogitEdits, paths: jax.Array) -> jax.Array:
    assert edits.penalties is not None and edits.history is not None
    (batch, width, vocab), penalties, history = logits.shape, edits.penalties, jnp.asarray(edits.history)
    rows = jnp.arange(batch)[:, None]
    answer = jnp.arange(history.shape[1]) >= penalties.prompts[:, None]
    nothing = jnp.zeros((batch, vocab), jnp.float32)
    in_prompt = nothing.at[rows, _dropped(jnp.where(answer, -1, history))].add(1.0, mode="drop")
    in_answer = nothing.at[rows, _dropped(jnp.where(answer, history, -1))].add(1.0, mode="drop")
    drafted = jnp.zeros((batch, width, vocab), jnp.float32)
    drafted = drafted.at[rows[..., None], jnp.arange(width)[:, None], _dropped(paths)].add(1.0, mode="drop")
    counts = in_answer[:, None] + drafted  # [B, T, V]
    seen = (counts + in_prompt[:, None]) > 0
    repetition, presence, frequency = (jnp.asarray(x)[:, None, None] for x in penalties[:3])
    weakened = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(seen & (repetition != 1), weakened, logits)
    return logits - jnp.where(counts > 0, frequency * counts + presence, 0.0)


def _processed(logits: jax.Array, edits: LogitEdits, paths: jax.Array) -> jax.Array:
    assert edits.history is not None and edits.lengths is not None and edits.processor is not None
    history, places = jnp.asarray(edits.history), jnp.asarray(edits.lengths)[:, None] + jnp.arange(paths.shape[2])
    ids = jnp.broadcast_to(history[:, None], (*logits.shape[:2], history.shape[1]))
    rows, columns = jnp.arange(len(logits))[:, None, None], jnp.arange(logits.shape[1])[:, None]
    ids = ids.at[rows, columns, places[:, None]].set(paths, mode="drop")
    for number, processor in enumerate(edits.processors.functions):
        edited = jax.vmap(jax.vmap(processor))(ids, logits).astype(jnp.float32)
        logits = jnp.where((jnp.asarray(edits.processor) == number)[:, None, None], edited, logits)
    return logits
