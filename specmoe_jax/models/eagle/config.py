"""What an EAGLE head is before its weights are read: its sizes, from config.json, and the tensors of its file."""

import dataclasses
from typing import Generic

import jax
from flax import struct

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import config_json as read
from specmoe_jax.models.families.naming import norm_spec
from specmoe_jax.models.families.parse import grouped_attention
from specmoe_jax.models.spec import LayerWeights, Leaf, MlpWeights, TensorSpec
from specmoe_jax.support.errors import CheckpointError

AUX_LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """Sizes and format of a head.

    feature_layers: the target's layers whose inputs are the features; empty for EAGLE-1, whose feature is the last hidden
    state after the final norm. draft_vocab_size: of EAGLE-3's own output matrix, None for EAGLE-1.
    """

    layer: LayerConfig
    hidden_size: int  # M, the target's
    bias: bool
    feature_layers: tuple[int, ...] = ()
    draft_vocab_size: int | None = None

    @property
    def fused(self) -> bool:
        """Whether it is an EAGLE-3 head."""
        return self.draft_vocab_size is not None

    @property
    def feature_size(self) -> int:
        """Numbers of the target's features at one position."""
        return self.hidden_size * max(len(self.feature_layers), 1)


@struct.dataclass
class EagleWeights(Generic[Leaf]):
    """Leaves are TensorSpecs or arrays. EAGLE-1 has the first three, EAGLE-3 all but the bias."""

    fc: Leaf  # [M, 2M]; EAGLE-3: [M, 3M]
    fc_bias: Leaf | None  # [M]
    layer: LayerWeights[Leaf]  # EAGLE-3: projections from 2M, input_norm is the embedding's
    hidden_norm: Leaf | None = None  # [M]
    norm: Leaf | None = None  # [M]
    lm_head: Leaf | None = None  # [V', M]
    to_target: jax.Array | None = None  # [V'] int32, the target's id of each draft id; read from d2t, so no spec


def parse_config(raw: dict, target: ModelConfig, *, fused: bool) -> EagleConfig:
    """EagleConfig of a head's config.json for a target. Raises CheckpointError where they do not fit each other.

    rope_theta is 10000 where absent, as in the published config of EAGLE for Mixtral (the target's own is 1e6).
    """
    hidden = read.size(raw, "hidden_size")
    for key, value, wanted in (
        ("hidden_size", hidden, target.hidden_size),
        ("vocab_size", read.size(raw, "vocab_size"), target.vocab_size),
    ):
        if value != wanted:
            raise CheckpointError(f"config.json: {key} is {value}, the model's is {wanted}: this head is of another model")
    read.require(raw, "hidden_act", "silu")
    if read.size(raw, "num_hidden_layers", default=1) != 1:
        raise CheckpointError(f"config.json: num_hidden_layers is {raw['num_hidden_layers']}; a head has one layer")
    layer = LayerConfig(
        attention=grouped_attention(raw, default_theta=1e4),
        router=None,
        experts=None,
        norm_eps=read.number(raw, "rms_norm_eps", 1e-6),
        mlp_hidden=read.size(raw, "intermediate_size"),
    )
    if not fused:
        return EagleConfig(layer=layer, hidden_size=hidden, bias=read.flag(raw, "bias", True))
    return EagleConfig(
        layer=layer,
        hidden_size=hidden,
        bias=False,
        feature_layers=_feature_layers(raw, target),
        draft_vocab_size=read.size(raw, "draft_vocab_size"),
    )


def _feature_layers(raw: dict, target: ModelConfig) -> tuple[int, ...]:
    """Those that the config names (SGLang's and vLLM's key), or the published rule: 2, L // 2 and L - 3."""
    named = raw.get("eagle_config")
    named = named if isinstance(named, dict) else raw
    chosen = read.layer_numbers(named, AUX_LAYERS_KEY) or (2, target.num_layers // 2, target.num_layers - 3)
    if len(chosen) != 3 or not 0 <= chosen[0] < chosen[1] < chosen[2] < target.num_layers:
        raise CheckpointError(
            f"config.json: features before layers {read.show(chosen)} of {target.num_layers}; an EAGLE-3 head takes three "
            f"ascending ones, {AUX_LAYERS_KEY} in eagle_config names them"
        )
    return chosen


def weight_specs(config: EagleConfig) -> EagleWeights[TensorSpec]:
    """Names and shapes of the published files; d2t and t2d of EAGLE-3 are integers and read apart."""
    hidden, prefix = config.hidden_size, "midlayer" if config.fused else "layers.0"
    inner = 2 * hidden if config.fused else hidden
    return EagleWeights(
        fc=TensorSpec("fc.weight", (hidden, 3 * hidden if config.fused else 2 * hidden)),
        fc_bias=TensorSpec("fc.bias", (hidden,)) if config.bias else None,
        layer=_layer_specs(config, prefix, inner),
        hidden_norm=norm_spec("midlayer.hidden_norm", hidden) if config.fused else None,
        norm=norm_spec("norm", hidden) if config.fused else None,
        lm_head=None if config.draft_vocab_size is None else TensorSpec("lm_head.weight", (config.draft_vocab_size, hidden)),
    )


def _layer_specs(config: EagleConfig, prefix: str, inner: int) -> LayerWeights[TensorSpec]:
    attention, hidden, width = config.layer.attention, config.hidden_size, config.layer.mlp_hidden
    assert width is not None  # a head's layer is dense
    q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{prefix}.{name}.weight", shape)

    return LayerWeights(
        input_norm=norm_spec(f"{prefix}.input_layernorm", hidden) if config.fused else None,
        q=spec("self_attn.q_proj", q, inner),
        k=spec("self_attn.k_proj", kv, inner),
        v=spec("self_attn.v_proj", kv, inner),
        o=spec("self_attn.o_proj", hidden, q),
        post_norm=norm_spec(f"{prefix}.post_attention_layernorm", hidden),
        mlp=MlpWeights(
            gate=spec("mlp.gate_proj", width, hidden),
            up=spec("mlp.up_proj", width, hidden),
            down=spec("mlp.down_proj", hidden, width),
        ),
    )
