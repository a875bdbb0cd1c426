"""What one layer computes, as frozen numbers: the static argument that its compiled programs depend on.

Layers that are alike have equal configs and so share programs, whatever family they belong to.
"""

import dataclasses
import math

CHOICE_DIGITS = 3  # numbers that a chosen position takes behind a hidden state (models/selection/handed.py)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021) as numbers; every scaling rule ends in frequencies and a factor (models/rope.py).

    frequencies: radians per position of each rotated pair; where they are fewer than half a head, the rest of the head
    stays as it is (partial rotary). scale: multiplies cos and sin. interleaved: pairs are (2i, 2i + 1) instead of
    (i, i + half).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False

    @classmethod
    def plain(cls, theta: float, dim: int, **options) -> "Rope":
        """Unscaled frequencies theta^(-2i / dim)."""
        return cls(frequencies=tuple(theta ** (-2 * i / dim) for i in range(dim // 2)), **options)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Head dims of multi-head latent attention (DeepSeek-V2, 2.1): keys and values are one compressed row a position.

    rank: of the compressed row. nope, rope: parts of a query head without and with positions. value: of a value head.
    """

    rank: int
    nope: int
    rope: int
    value: int


@dataclasses.dataclass(frozen=True)
class Indexer:
    """What chooses the positions that a query attends of a longer context (models/selection), beside latent attention.

    heads, dim: of index queries; an index key has one head. kept: positions that a query attends at most. rope: of the first
    numbers of queries and keys.
    """

    heads: int
    dim: int
    kept: int
    rope: Rope

    @property
    def asked(self) -> int:
        """Numbers of a position's index queries, a weight with each."""
        return self.heads * (self.dim + 1)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Linear attention by the gated delta rule (Yang et al. 2024, Gated DeltaNet): a state of fixed size instead of a cache.

    key_heads, value_heads: each key head serves as many consecutive value heads. key, value: dims of a head. taps: of the causal
    convolution before the rule. by_key_head: whether what is projected is stored key head by key head (Qwen3-Next).
    """

    key_heads: int
    value_heads: int
    key: int
    value: int
    taps: int
    by_key_head: bool = False

    @property
    def channels(self) -> int:
        """Numbers of a position that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value

    @property
    def row(self) -> int:
        """Numbers of a position that are kept until it can no longer be rolled back: the channels, and two rates a value head."""
        return self.channels + 2 * self.value_heads

    @property
    def state(self) -> int:
        """Numbers of the state of one sequence."""
        return self.value_heads * self.key * self.value

    def kept_rows(self, replayed: int) -> int:
        """Positions of which rows are kept, where up to `replayed` may be rolled back: those, and what the convolution sees."""
        return replayed + self.taps - 1


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """H, K, D and the variants. What is None or False is absent.

    scale: of the scores. window: attend the last so many positions. chunk: attend only positions of one's own chunk
    of so many (Llama-4). l2_norm: of queries and keys, after the rotation. temperature: (floor, scale) of queries
    that grow with their position (Llama-4). latent: then K = 1 and D is what the cache holds, rank + rope.
    qkv_bias, qk_norm: whether the layer has biases of queries, keys and values, and norms of queries and keys, where its
    family leaves that open. gated: queries come with a gate of their outputs (Qwen3-Next), behind them in the last axis.
    value_dim: of a value head where it is not D (MiMo); zeros fill its cache. value_scale: multiplies values.
    recurrent: then nothing is attended, H and K are value and key heads, and there is no cache by positions.
    indexer: index keys lie behind the latent in the value cache, so D is rank + the larger of rope and index dim; queries come
    with what they ask of it, behind them in the last axis.
    taken: positions that an earlier layer's indexer chose for each query, at most, which come behind the hidden state; this layer
    attends those (GLM-5.2). hands_on: whether the next layer takes what this one has attended.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    chunk: int | None = None
    l2_norm: bool = False
    temperature: tuple[float, float] | None = None
    latent: Latent | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    gated: bool = False
    value_dim: int | None = None
    value_scale: float = 1.0
    recurrent: Recurrence | None = None
    indexer: Indexer | None = None
    taken: int | None = None
    hands_on: bool = False

    @property
    def cache_dim(self) -> int:
        """Row length of the KV cache: D up to the next multiple of 8, which the attention kernel asks for."""
        return -(-self.head_dim // 8) * 8

    @property
    def cache_row(self) -> int:
        """Numbers that one position takes in the key cache, and again in the value cache."""
        return 0 if self.recurrent else self.num_kv_heads * self.cache_dim

    @property
    def output_dim(self) -> int:
        """Of what one query head gives: of a value head."""
        return self.value_dim or self.head_dim

    @property
    def asked_dim(self) -> int:
        """Of the share of one query head in what a position asks an indexer for, or in the choice that it takes."""
        return -(-(self.indexer.asked if self.indexer else self.taken_numbers) // self.num_heads)

    @property
    def kept(self) -> int | None:
        """Positions that a query attends at most, of a longer context; None for all."""
        return self.indexer.kept if self.indexer else self.taken

    @property
    def taken_numbers(self) -> int:
        """Of the choice that comes behind a hidden state."""
        return CHOICE_DIGITS * (self.taken or 0)

    @property
    def told_numbers(self) -> int:
        """Of the choice that comes behind a token's attended values, for the layers after this one."""
        return CHOICE_DIGITS * self.indexer.kept if self.indexer and self.hands_on else 0

    @property
    def query_dim(self) -> int:
        """Of what comes with one query head: itself, and where there are any its gate and its share of the indexer's."""
        return (2 * self.head_dim if self.gated else self.head_dim) + self.asked_dim


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """E, A and the rule (models/routing.py).

    rule: "softmax" or "sigmoid". choice_bias: experts are chosen by their score plus a bias of their own, which the
    weights do not contain (DeepSeek-V3). renormalise: the chosen weights sum to 1. scaling: multiplies them. groups:
    (groups, groups chosen) where the choice is limited to the best groups, ranked by the sum of their `group_best` best
    scores. on_input: weights multiply what goes into the expert instead of what comes out.
    """

    num_experts: int
    experts_per_token: int
    rule: str = "softmax"
    renormalise: bool = False
    scaling: float = 1.0
    groups: tuple[int, int] | None = None
    group_best: int = 1
    choice_bias: bool = False
    on_input: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """One expert. hidden: F. biased: the block is bordered by biases (models/experts.py).

    packing: None for weights as they are, else the name of a kind of models/packing and its parameters.
    activation: "swiglu", "clamped_swiglu" with its alpha and limit (GPT-OSS), or "relu", which has no gate (NLLB).
    """

    hidden: int
    model: int
    activation: str = "swiglu"
    biased: bool = False
    alpha: float = 0.0
    limit: float = 0.0
    packing: str | None = None

    @property
    def matrices(self) -> int:
        """2 without a gate, else 3."""
        return 2 if self.activation == "relu" else 3

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of an expert in memory: gate, up and down transposed, [3, F, M], or [3, F + 1, M + 1] with biases.

        Without a gate the first axis is 2.
        """
        border = int(self.biased)
        return (self.matrices, self.hidden + border, self.model + border)

    @property
    def params(self) -> int:
        """Weights of a block."""
        return math.prod(self.block_shape)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """A layer. router and experts are None where the layer has a dense MLP alone.

    mlp_hidden: width of the dense MLP or of the shared expert, None where there is neither. cross: attention to what an
    encoder has read, between the self-attention and the rest. residual_scale: multiplies what attention and MLP add to the
    residual (Granite); experts have it in their router's scaling. norm_plus: added to the weights of RMSNorms, which are stored
    less that (Qwen3-Next: 1).
    """

    attention: AttentionConfig
    router: RouterConfig | None
    experts: ExpertConfig | None
    norm_eps: float
    mlp_hidden: int | None = None
    cross: AttentionConfig | None = None
    residual_scale: float = 1.0
    norm_plus: float = 0.0

    @property
    def own_router(self) -> RouterConfig:
        """Of a layer that has experts."""
        assert self.router is not None
        return self.router

    @property
    def own_experts(self) -> ExpertConfig:
        """Of a layer that has experts."""
        assert self.experts is not None
        return self.experts


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Token embeddings times `scale`, and where there is a pad_id plus sinusoidal positions (NLLB), which begin at pad_id + 1.

    pad_id itself has none.
    """

    scale: float
    pad_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """Final norm and logits. divisor: of the logits (Granite). norm_plus: as of LayerConfig."""

    norm_eps: float
    divisor: float = 1.0
    norm_plus: float = 0.0


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What reads the prompt, once and in both directions, where the decoder only writes (NLLB).

    layers: without cross attention; those with experts have the decoder's. start: tokens that the decoder begins with:
    decoder_start_token_id and, where the target language is forced, its token.
    """

    layers: tuple[LayerConfig, ...]
    start: tuple[int, ...]
