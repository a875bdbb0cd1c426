"""What an EAGLE head is before its weights are read: its sizes, from config.json, and the tensors of its file."""

import dataclasses
from collections.abc import Collection
from typing import Generic

import jax
from flax import struct

from specmoe_jax.config.layer_config import LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import config_json as read
from specmoe_jax.models.published.naming import norm_spec
from specmoe_jax.models.published.parse import grouped_attention
from specmoe_jax.models.spec import LayerWeights, Leaf, MlpWeights, TensorSpec
from specmoe_jax.support.errors import CheckpointError

AUX_LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
NESTED_KEY = "transformer_layer_config"  # of heads that the speculators library wrote


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """Sizes and format of a head.

    feature_layers: the target's layers whose inputs are the features; empty for EAGLE-1, whose feature is the last hidden
    state after the final norm. draft_vocab_size: of EAGLE-3's own output matrix, None for EAGLE-1.
    Of EAGLE-3 as the speculators library trains it: norm_before_residual, the layer's residual stream begins with the normed
    feature; norm_before_fc, the three features are normed together; norm_output, the predicted feature is the normed one.
    """

    layer: LayerConfig
    hidden_size: int  # M, the target's
    bias: bool
    feature_layers: tuple[int, ...] = ()
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

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
    fc_norm: Leaf | None = None  # [3M], where norm_before_fc
    to_target: jax.Array | None = None  # [V'] int32, the target's id of each draft id; read from d2t, so no spec


def parse_config(raw: dict, target: ModelConfig, *, fused: bool) -> EagleConfig:
    """EagleConfig of a head's config.json for a target. Raises CheckpointError where they do not fit each other.

    rope_theta is 10000 where absent, as in the published config of EAGLE for Mixtral (the target's own is 1e6).
    """
    raw = _flat(raw)
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
    read.layer_types(raw, 1, ("full_attention",))
    for key in ("attention_bias", "mlp_bias", "fc_norm"):
        read.require(raw, key, False)
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
        norm_before_residual=read.flag(raw, "norm_before_residual"),
        norm_before_fc=read.flag(raw, "norm_before_fc"),
        norm_output=read.flag(raw, "norm_output"),
    )


def _flat(raw: dict) -> dict:
    """One object of what some writers nest: the layer's config (speculators), eagle_config (NVIDIA, SGLang)."""
    kind = raw.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise CheckpointError(f"config.json: speculators_model_type is {read.show(kind)}; of that library's heads eagle3 is built")
    inner = [raw.get(key) for key in (NESTED_KEY, "eagle_config")]
    return {key: value for part in (*inner, raw) if isinstance(part, dict) for key, value in part.items() if value is not None}


def _feature_layers(raw: dict, target: ModelConfig) -> tuple[int, ...]:
    """Those that the config names (SGLang's and vLLM's key), or the published rule: 2, L // 2 and L - 3."""
    chosen = read.layer_numbers(raw, AUX_LAYERS_KEY) or (2, target.num_layers // 2, target.num_layers - 3)
    if len(chosen) != 3 or not 0 <= chosen[0] < chosen[1] < chosen[2] < target.num_layers:
        raise CheckpointError(
            f"config.json: features before layers {read.show(chosen)} of {target.num_layers}; an EAGLE-3 head takes three "
            f"ascending ones, {AUX_LAYERS_KEY} in eagle_config names them"
        )
    return chosen


def weight_specs(config: EagleConfig) -> EagleWeights[TensorSpec]:
    """Names and shapes of the published files (`canonical_name`); d2t and t2d of EAGLE-3 are integers and read apart."""
    hidden, prefix = config.hidden_size, "midlayer" if config.fused else "layers.0"
    inner = 2 * hidden if config.fused else hidden
    return EagleWeights(
        fc=TensorSpec("fc.weight", (hidden, 3 * hidden if config.fused else 2 * hidden)),
        fc_bias=TensorSpec("fc.bias", (hidden,)) if config.bias else None,
        layer=_layer_specs(config, prefix, inner),
        hidden_norm=norm_spec("midlayer.hidden_norm", hidden) if config.fused else None,
        norm=norm_spec("norm", hidden) if config.fused else None,
        lm_head=None if config.draft_vocab_size is None else TensorSpec("lm_head.weight", (config.draft_vocab_size, hidden)),
        fc_norm=norm_spec("input_norm", 3 * hidden) if config.norm_before_fc else None,
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


def is_fused(names: Collection[str]) -> bool:
    """Whether these are the tensors of an EAGLE-3 head, in either spelling."""
    names = [name.removeprefix("model.") for name in names]
    return any(name.startswith(("midlayer.", "layers.0.hidden_norm.")) or name in ("d2t", "t2d") for name in names)


def canonical_name(name: str, *, fused: bool) -> str | None:
    """The specs' name of a stored one: SpecForge writes midlayer, vLLM and speculators layers.0, some a prefix model."""
    name = name.removeprefix("model.")
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return name.replace("layers.0.", "midlayer.", 1) if fused and name.startswith("layers.0.") else name
