"""Random decoders in the shape of NLLB-MoE's (128 experts, top-2, 6 MoE layers) or a Qwen3-MoE's (128, top-8), as skewed as asked.

For the speed of offloading where no trained model of that shape fits. Its text is a count: token t of a topic is
followed by token t + 1 of the same topic, for the draft as for the target, so every preset decodes the same tokens and
their traffic can be compared. Figures that it touched are stamped `synthetic_routing`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models import layers
from specmoe_jax.models.model import Model, random_model, reference_attention
from specmoe_jax.support.statistics import gini

TOPIC = 256  # tokens of a topic, a cycle; longer than what a row generates in a measurement
CONSTANT_SHARE = 0.3  # of an embedding's squared length: the direction that the routers' bias leans on
NLLB_SKEW = 0.84  # of NLLB-MoE, published
SAMPLE_ROWS, SAMPLE_TOKENS = 64, 32  # the batch on which the skew is calibrated: 4,096 choices of a layer

NLLB_SHAPED = ModelConfig(
    family="mixtral",
    vocab_size=8 * TOPIC,
    hidden_size=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    expert_hidden=128,
    num_experts=128,
    experts_per_token=2,
    max_positions=1024,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie_embeddings=False,
    sliding_window=None,
    eos_token_ids=(),
)


class Shape(NamedTuple):
    """skew: Gini coefficient of the expert counts. acceptance: of a token of the self-draft, which drafts draft_length of them."""

    config: ModelConfig
    skew: float
    acceptance: float
    draft_length: int


# NLLB-MoE's figures are SpecMoE's. Of Qwen3-30B-A3B a draft's acceptance with hot experts is published; its skew is assumed.
SHAPES = {
    "nllb_shaped": Shape(NLLB_SHAPED, NLLB_SKEW, acceptance=0.913, draft_length=10),
    "qwen3_shaped": Shape(
        dataclasses.replace(NLLB_SHAPED, hidden_size=128, head_dim=32, num_layers=8, expert_hidden=48, experts_per_token=8),
        skew=0.4,
        acceptance=0.342,
        draft_length=4,
    ),
}


def synthetic_model(
    config: ModelConfig = NLLB_SHAPED, *, skew: float = NLLB_SKEW, topic_share: float = 0.5, seed: int = 0, dtype: str = "float32"
) -> Model:
    """Random weights with routing as `with_synthetic_routing` makes it."""
    return with_synthetic_routing(random_model(config, seed=seed, dtype=dtype), skew=skew, topic_share=topic_share, seed=seed)


def shaped_model(name: str, *, skew: float | None = None, topic_share: float = 0.5, dtype: str = "float32") -> Model:
    """synthetic_model of a name in SHAPES, with the skew that is given there unless another is asked for."""
    shape = SHAPES[name]
    return synthetic_model(shape.config, skew=shape.skew if skew is None else skew, topic_share=topic_share, dtype=dtype)


def with_synthetic_routing(model: Model, *, skew: float = NLLB_SKEW, topic_share: float = 0.5, seed: int = 0) -> Model:
    """The model with other routers, embeddings and output matrix: in every layer the Gini coefficient of the expert counts over a
    large batch is `skew`.

    topic_share: how much of the choice, beyond an expert's own hotness, is due to the row's topic, which stays, and not
    to the token, which changes. Which experts are hot differs by layer. vocab_size must be a multiple of TOPIC.
    """
    config, dtype, rng = model.config, model.dtype, np.random.default_rng([seed, 1])
    embed, head = _vocabulary(config, topic_share, rng)
    weights = dataclasses.replace(model.weights, embed=jnp.asarray(embed, dtype), lm_head=jnp.asarray(head, dtype))
    h = layers.embed(weights, jnp.asarray(_walks(config, SAMPLE_ROWS, SAMPLE_TOKENS, rng), jnp.int32))
    calibrated = []
    for kind, layer, blocks in zip(config.layers, weights.layers, model.experts, strict=True):
        h, x = _attend(kind, layer, h)
        router = jnp.asarray(_router(config, np.asarray(x, np.float32), skew, rng), dtype)
        layer = dataclasses.replace(layer, router=router)
        h = _through_experts(kind, router, _on_accelerator(blocks), h, x)
        calibrated.append(layer)
    weights = dataclasses.replace(weights, layers=tuple(calibrated))
    return dataclasses.replace(model, weights=weights, synthetic=("synthetic_routing",))


def synthetic_prompts(config: ModelConfig, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts that begin somewhere in some topic and count on."""
    return [tuple(row) for row in _walks(config, count, length, np.random.default_rng([seed, 2])).tolist()]


def _on_accelerator(blocks) -> jax.Array:
    """All experts of a layer [E, *block]."""
    return jnp.stack([jax.device_put(block, jax.memory.Space.Device) for block in blocks])


def _walks(config: ModelConfig, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    topics = rng.integers(config.vocab_size // TOPIC, size=(rows, 1))
    return topics * TOPIC + (rng.integers(TOPIC, size=(rows, 1)) + np.arange(length)) % TOPIC


def _vocabulary(config: ModelConfig, topic_share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [V, M] of equal length (constant, topic and token parts), and the head that answers t with t + 1."""
    V, M = config.vocab_size, config.hidden_size
    constant, topic, token = (_units(rng, n, M) for n in (1, V // TOPIC, V))
    topic, token = (part - (part @ constant.T) * constant for part in (topic, token))
    own = math.sqrt(topic_share) * np.repeat(topic, TOPIC, axis=0) + math.sqrt(1 - topic_share) * token
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    embed = math.sqrt(CONSTANT_SHARE) * constant + math.sqrt(1 - CONSTANT_SHARE) * own
    ids = np.arange(V)
    successor = ids - ids % TOPIC + (ids + 1) % TOPIC
    head = np.empty_like(own)
    head[successor] = own
    return 4 * math.sqrt(M) * embed, head  # 4: what the layers add must not hide the token


def _units(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _through_experts(config: LayerConfig, router: jax.Array, blocks: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
    """h with the chosen experts of blocks [E, *block] added."""
    routing = layers.route(config.own_router, x, router, None, jnp.ones(len(x), bool))
    return layers.combine(h, ops.expert_ffn(x, blocks, routing.ids), routing)


@functools.partial(jax.jit, static_argnums=0)
def _attend(config: LayerConfig, layer, h):
    """h after the attention of whole sequences [B, T, M], and the experts' input x [n, M]."""
    positions = jnp.broadcast_to(jnp.arange(h.shape[1]), h.shape[:2])
    q, k, v = layers.pre_attention(config, layer, h, positions)
    attended = reference_attention(config.attention, q, k, v)
    h, x, _ = layers.post_attention(config, layer, h, attended, jnp.ones(h.shape[:2], bool))
    return h, x


def _router(config: ModelConfig, x: np.ndarray, skew: float, rng: np.random.Generator) -> np.ndarray:
    """[E, M]: random preferences, and along the mean of x [n, M] a normal bias as wide as the skew needs (bisection)."""
    mean = x.mean(axis=0) / np.linalg.norm(x.mean(axis=0))
    taste = rng.standard_normal((config.num_experts, config.hidden_size))
    taste -= (taste @ mean)[:, None] * mean
    liking = x @ taste.T  # [n, E]
    taste, liking = taste / liking.std(), liking / liking.std()
    bias = rng.standard_normal(config.num_experts)
    along = (x @ mean)[:, None]
    low, high = 0.0, 50.0 / along.mean()
    for _ in range(30):
        middle = (low + high) / 2
        chosen = np.argpartition(liking + middle * along * bias, -config.experts_per_token, axis=1)
        counts = np.bincount(chosen[:, -config.experts_per_token :].ravel(), minlength=config.num_experts)
        low, high = (middle, high) if gini(counts) < skew else (low, middle)
    return taste + high * bias[:, None] * mean
