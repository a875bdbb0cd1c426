"""The sizes and rules of one model."""

import dataclasses
import functools

from specmoe_jax.config.layer_config import (
    AttentionConfig,
    Embedding,
    EncoderConfig,
    ExpertConfig,
    Head,
    LayerConfig,
    Rope,
    RouterConfig,
)
from specmoe_jax.support.errors import CheckpointError

LAYERS = "|"  # between the names of layers that are packed differently


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and rules of one model, read from its config.json and never assumed (letters: types.py).

    layer_configs: what each layer computes. Left out, all layers are alike and as Mixtral's: plain rotary positions of
    `rope_theta`, `sliding_window`, softmax routing with renormalised weights.
    expert_hidden, num_experts, experts_per_token: of every layer that has experts; they share one pool of slots.
    embedding: None for plain token embeddings. encoder: None for a decoder alone; what is not said of the encoder
    (num_layers, layers, moe_layers) is the decoder's.
    """

    family: str
    vocab_size: int  # V
    hidden_size: int  # M
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    expert_hidden: int  # F
    num_experts: int  # E
    experts_per_token: int  # A
    max_positions: int
    rope_theta: float | None = None
    norm_eps: float
    tie_embeddings: bool
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...]
    query_rank: int | None = None  # of compressed queries (DeepSeek-V2)
    mtp_layers: int = 0  # that predict further tokens, stored after the last layer; a checkpoint may lack them
    layer_configs: tuple[LayerConfig, ...] | None = None
    embedding: Embedding | None = None
    logits_divisor: float = 1.0
    encoder: EncoderConfig | None = None

    def __hash__(self) -> int:
        """Of the sizes alone: every call of a program that was compiled for a config asks for it, and all fields of 48 layers
        take longer than the call."""
        return hash((self.family, self.vocab_size, self.hidden_size, self.num_layers, self.expert_hidden, self.num_experts))

    @functools.cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """One config a layer, equal where layers are alike."""
        return self.layer_configs or (_uniform_layer(self),) * self.num_layers

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts. Residency, usage scores and expert stores count these only, from 0."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.router is not None)

    @functools.cached_property
    def moe_index(self) -> tuple[int | None, ...]:
        """Of each layer its place among those that have experts; None for a dense one."""
        return tuple(self.moe_layers.index(i) if i in self.moe_layers else None for i in range(self.num_layers))

    @functools.cached_property
    def head(self) -> Head:
        return Head(norm_eps=self.norm_eps, divisor=self.logits_divisor, norm_plus=self.layers[-1].norm_plus)

    @functools.cached_property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Layers with a state of fixed size in the place of a cache by positions."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.attention.recurrent is not None)

    @functools.cached_property
    def state_numbers(self) -> int:
        """Of the widest hidden state, with the choice of positions that goes behind it."""
        return self.hidden_size + max(layer.attention.taken_numbers for layer in self.layers)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @functools.cached_property
    def all_layers(self) -> tuple[LayerConfig, ...]:
        """The decoder's, then the encoder's."""
        return self.layers + (self.encoder.layers if self.encoder else ())

    @functools.cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """Those of all layers that have experts: the order of Model.experts, of the tiers below and of residency."""
        return tuple(i for i, layer in enumerate(self.all_layers) if layer.router is not None)

    @property
    def num_expert_layers(self) -> int:
        return len(self.expert_layers)

    @property
    def experts(self) -> ExpertConfig:
        """The expert of every layer that has any; where layers are packed differently (`layer_experts`), of the first."""
        return self.layers[self.moe_layers[0]].own_experts

    @functools.cached_property
    def layer_experts(self) -> tuple[ExpertConfig, ...]:
        """The expert of each layer that has any, in the order of `expert_layers`."""
        return tuple(self.all_layers[layer].own_experts for layer in self.expert_layers)

    @property
    def packing(self) -> str | None:
        """How the experts are packed: one name for all layers, or one for each that has experts, separated by |."""
        names = [experts.packing for experts in self.layer_experts]
        return names[0] if len(set(names)) == 1 else LAYERS.join(str(name) for name in names)

    def with_packing(self, packing: str | None) -> "ModelConfig":
        """The model with its experts packed so; packing: as the property. Raises CheckpointError for a wrong number of names."""
        names = [None] if packing is None else packing.split(LAYERS)
        names = names * self.num_expert_layers if len(names) == 1 else names
        if len(names) != self.num_expert_layers:
            raise CheckpointError(f"experts of {len(names)} layers are packed; the model has experts in {self.num_expert_layers}")
        if packing == self.packing:
            return self
        of_layer, count = dict(zip(self.expert_layers, names, strict=True)), self.num_layers

        def layers(of: tuple[LayerConfig, ...], first: int) -> tuple[LayerConfig, ...]:
            return tuple(
                dataclasses.replace(
                    layer, experts=layer.experts and dataclasses.replace(layer.experts, packing=of_layer.get(first + i))
                )
                for i, layer in enumerate(of)
            )

        encoder = self.encoder and dataclasses.replace(self.encoder, layers=layers(self.encoder.layers, count))
        return dataclasses.replace(self, layer_configs=layers(self.layers, 0), encoder=encoder)

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down, F x M each, and the biases where it has some."""
        return self.experts.params


def _uniform_layer(config: ModelConfig) -> LayerConfig:
    assert config.rope_theta is not None
    return LayerConfig(
        attention=AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            rope=Rope.plain(config.rope_theta, config.head_dim),
            window=config.sliding_window,
        ),
        router=RouterConfig(num_experts=config.num_experts, experts_per_token=config.experts_per_token, renormalise=True),
        experts=ExpertConfig(hidden=config.expert_hidden, model=config.hidden_size),
        norm_eps=config.norm_eps,
    )
