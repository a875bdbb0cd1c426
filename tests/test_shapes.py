"""The shapes and types that docstrings promise, checked by jaxtyping on real calls; B, N, V, ... must agree within a call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64, Key, TypeCheckError, jaxtyped

import specmoe_jax as sm
from specmoe_jax.speculate import acceptance, sampling
from specmoe_jax.speculate.hot_experts import affinity
from specmoe_jax.speculate.hot_experts import usage as hotness
from specmoe_jax.testing import TINY, oracles

checked = jaxtyped(typechecker=beartype)
B, N, V, E = 3, 4, 11, 6
RNG = np.random.default_rng(0)
DRAFT = jnp.asarray(RNG.integers(0, V, (B, N)), jnp.int32)
LOGITS = jnp.asarray(RNG.normal(size=(B, N + 1, V)), jnp.float32)
ROWS = sampling.sampling_rows([sm.SamplingParams(temperature=1.0, top_k=k) for k in (0, 3, 5)])


@checked
def accept(
    keys: Key[Array, "B"], tokens: Int32[Array, "B N"], probs: Float32[Array, "B N V"] | None, logits: Float32[Array, "B N+1 V"]
) -> tuple[Int32[Array, "B"], Int32[Array, "B"]]:
    return tuple(acceptance.accept(keys, tokens, probs, logits, ROWS))


@checked
def accept_greedy(tokens: Int32[Array, "B N"], logits: Float32[Array, "B N+1 V"]) -> tuple[Int32[Array, "B"], Int32[Array, "B"]]:
    return tuple(acceptance.accept_greedy(tokens, logits))


@checked
def accepted_tokens(tokens: Int32[Array, "B N"], logits: Float32[Array, "B N+1 V"]) -> Int32[Array, "B N+1"]:
    return oracles.accepted_tokens(tokens, acceptance.accept_greedy(tokens, logits))


@checked
def finite_positions(logits: Float[Array, "B T V"]) -> Bool[Array, "B T"]:
    return acceptance.finite_positions(logits)


@checked
def transform_logits(logits: Float32[Array, "B T V"]) -> Float32[Array, "B T V"]:
    return sampling.transform_logits(logits, ROWS)


@checked
def count_choices(ids: Int[np.ndarray, "n A"]) -> Int64[np.ndarray, f"{E}"]:
    return hotness.count_choices(ids, E)


@checked
def hot_set(counts: Int64[np.ndarray, "E"], resident: Bool[np.ndarray, "E"]) -> Bool[np.ndarray, "E"]:
    return hotness.hot_set(counts, resident, 2)


@checked
def neighbours(distances: Float32[np.ndarray, "E E"]) -> Int32[np.ndarray, "E E"]:
    return affinity.neighbours(distances)


@checked
def logits_of(model: sm.Model, token_ids: Int[Array, "B T"]) -> Float32[Array, "B T {model.config.vocab_size}"]:
    return model.logits(token_ids)


@checked
def attend(
    q: Float32[Array, "B T H D"],
    k_new: Float32[Array, "B T K D"],
    v_new: Float32[Array, "B T K D"],
    k_cache: Float32[Array, "B K S D"],
    v_cache: Float32[Array, "B K S D"],
    lengths: Int32[Array, "B"],
) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B K S D"], Float32[Array, "B K S D"]]:
    return sm.ops.chunked_attention(q, k_new, v_new, k_cache, v_cache, lengths)


def test_acceptance():
    keys = jax.random.split(jax.random.key(0), B)
    accept(keys, DRAFT, None, LOGITS)
    accept(keys, DRAFT, jax.nn.softmax(LOGITS[:, :-1]), LOGITS)
    accept_greedy(DRAFT, LOGITS)
    accept_greedy(DRAFT[:, :0], LOGITS[:, :1])
    accepted_tokens(DRAFT, LOGITS)
    finite_positions(LOGITS)
    transform_logits(LOGITS)


def test_policies():
    counts = count_choices(RNG.integers(-1, E, (7, 2)))
    hot_set(counts, counts > 1)
    neighbours(RNG.random((E, E), np.float32))


def test_model_and_attention(model):
    logits_of(model, jnp.asarray(RNG.integers(0, TINY.vocab_size, (2, 5))))
    heads, kv_heads, dim, width, positions = 6, 3, 8, 4, 16
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)  # noqa: E731
    new, cache = (B, width, kv_heads, dim), (B, kv_heads, positions, dim)
    attend(draw(B, width, heads, dim), draw(*new), draw(*new), draw(*cache), draw(*cache), jnp.array([0, 3, 9], jnp.int32))


def test_a_wrong_shape_is_seen():
    """Negative control: the checks are on."""
    with pytest.raises(TypeCheckError):
        accept_greedy(DRAFT, LOGITS[:, :-1])
