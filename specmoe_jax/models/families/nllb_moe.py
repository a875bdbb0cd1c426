"""NLLB-MoE (NLLB Team 2022): an encoder-decoder with experts in every few layers of both, the main model of SpecMoE."""

import math
from typing import Any

from specmoe_jax.config.layer_config import AttentionConfig, Embedding, EncoderConfig, ExpertConfig, LayerConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import config_json as read
from specmoe_jax.models.spec import (
    CrossWeights,
    EncoderWeights,
    LayerWeights,
    Layout,
    MlpWeights,
    Part,
    TensorSpec,
    Weights,
    down_bias_of,
    inner_of,
    outer_of,
    up_bias_of,
)
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "NllbMoeForConditionalGeneration"
NORM_EPS = 1e-5  # PyTorch's default, of which the configs say nothing
COPIES_OF_EMBEDDING = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")  # of model.shared
POSITIONS = ".embed_positions.weights"  # sinusoids, which older releases stored


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    read.require(raw, "activation_function", "relu")
    read.require(raw, "tie_word_embeddings", True)
    read.require(raw, "router_dtype", "float32")
    read.require(raw, "router_bias", False)
    _refuse_what_is_not_lossless(raw)
    router = RouterConfig(
        num_experts=read.size(raw, "num_experts"),
        experts_per_token=2,
        renormalise=True,
        scaling=1.0 - read.number(raw, "moe_token_dropout", 0.2),  # the mean of what training dropped
    )
    read.check_choice(raw, router.num_experts, router.experts_per_token)
    decoder, encoder = (_stack(raw, name, router) for name in ("decoder", "encoder"))
    experts = [layer.experts for layer in decoder + encoder if layer.experts is not None]
    if all(layer.router is None for layer in decoder):
        raise CheckpointError("config.json: no layer of the decoder has experts; this engine runs mixtures of experts")
    if len(set(experts)) > 1:
        raise CheckpointError("config.json: encoder_ffn_dim and decoder_ffn_dim differ; their experts share one pool of slots")
    hidden, attention = read.size(raw, "d_model"), decoder[0].attention
    return ModelConfig(
        family="nllb_moe",
        vocab_size=read.size(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=len(decoder),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        expert_hidden=experts[0].hidden,
        num_experts=router.num_experts,
        experts_per_token=router.experts_per_token,
        max_positions=read.size(raw, "max_position_embeddings"),
        norm_eps=NORM_EPS,
        tie_embeddings=True,
        eos_token_ids=read.token_ids(raw.get("eos_token_id")),
        layer_configs=decoder,
        embedding=Embedding(
            scale=math.sqrt(hidden) if read.flag(raw, "scale_embedding", True) else 1.0,
            pad_id=read.token_id(raw, "pad_token_id", 1),
        ),
        encoder=EncoderConfig(layers=encoder, start=(read.token_id(raw, "decoder_start_token_id", 2),)),
    )


def weight_specs(config: ModelConfig) -> Weights[TensorSpec]:
    """Specs of everything but the experts, in checkpoint names."""
    hidden = config.hidden_size
    decoder = tuple(_layer_specs(config, i) for i in range(config.num_layers))
    assert config.encoder is not None
    encoder = tuple(_layer_specs(config, config.num_layers + i) for i in range(len(config.encoder.layers)))
    norms = {name: _affine_specs(f"model.{name}.layer_norm", (hidden,), "ones") for name in ("decoder", "encoder")}
    return Weights(
        embed=TensorSpec("model.shared.weight", (config.vocab_size, hidden)),
        layers=decoder,
        final_norm=norms["decoder"][0],
        final_norm_bias=norms["decoder"][1],
        lm_head=None,
        encoder=EncoderWeights(layers=encoder, final_norm=norms["encoder"][0], final_norm_bias=norms["encoder"][1]),
    )


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """The way in which an expert is stored."""
    experts, prefix = config.experts, f"{_layer_prefix(config, layer)}.ffn.experts.expert_{expert}"
    wide = (experts.hidden, experts.model)
    return (
        (
            Part(TensorSpec(f"{prefix}.fc1.weight", wide), inner_of),
            Part(TensorSpec(f"{prefix}.fc1.bias", wide[:1]), up_bias_of),
            Part(TensorSpec(f"{prefix}.fc2.weight", wide[::-1]), outer_of),
            Part(TensorSpec(f"{prefix}.fc2.bias", wide[1:]), down_bias_of),
        ),
    )


def canonical_name(name: str) -> str | None:
    """None for positions, which are computed."""
    return None if name.endswith(POSITIONS) else name


def _refuse_what_is_not_lossless(raw: dict) -> None:
    """Routing that draws numbers or depends on batch mates: no token could be the same with and without speculation."""
    policy, fraction = raw.get("second_expert_policy", "all"), read.number(raw, "moe_eval_capacity_token_fraction", 1.0)
    if policy != "all":
        raise CheckpointError(
            f"config.json: second_expert_policy is {read.show(policy)}; its routing is random, so nothing could be lossless: "
            "this family is built with 'all'"
        )
    if fraction < 1:
        raise CheckpointError(
            f"config.json: moe_eval_capacity_token_fraction is {fraction}; below 1, tokens lose their experts to batch mates, so "
            "nothing could be lossless: this family is built with 1.0"
        )


def _stack(raw: dict, name: str, router: RouterConfig) -> tuple[LayerConfig, ...]:
    """The layers of "encoder" or "decoder"."""
    hidden, num_heads, width = (read.size(raw, key) for key in ("d_model", f"{name}_attention_heads", f"{name}_ffn_dim"))
    step = raw.get(f"{name}_sparse_step", 4)
    if hidden % num_heads or hidden < 4:
        raise CheckpointError(f"config.json: d_model is {hidden}; it must be a multiple of {name}_attention_heads, {num_heads}")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"config.json: {name}_sparse_step is {read.show(step)}; it must be a whole number, 0 for no experts")
    head_dim = hidden // num_heads
    attention = AttentionConfig(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, scale=head_dim**-0.5, rope=None)
    experts = ExpertConfig(hidden=width, model=hidden, activation="relu", biased=True)

    def layer(index: int) -> LayerConfig:
        sparse = step > 0 and (index + 1) % step == 0
        return LayerConfig(
            attention=attention,
            router=router if sparse else None,
            experts=experts if sparse else None,
            norm_eps=NORM_EPS,
            mlp_hidden=None if sparse else width,
            cross=attention if name == "decoder" else None,
        )

    return tuple(layer(index) for index in range(read.num_layers(raw, f"{name}_layers")))


def _layer_prefix(config: ModelConfig, layer: int) -> str:
    """The layers after the decoder's are the encoder's."""
    own = layer < config.num_layers
    return f"model.decoder.layers.{layer}" if own else f"model.encoder.layers.{layer - config.num_layers}"


def _layer_specs(config: ModelConfig, index: int) -> LayerWeights[TensorSpec]:
    prefix, layer, hidden = _layer_prefix(config, index), config.all_layers[index], config.hidden_size
    input_norm, input_norm_bias = _affine_specs(f"{prefix}.self_attn_layer_norm", (hidden,), "ones")
    post_norm, post_norm_bias = _affine_specs(f"{prefix}.ff_layer_norm", (hidden,), "ones")
    return LayerWeights(
        input_norm=input_norm,
        input_norm_bias=input_norm_bias,
        post_norm=post_norm,
        post_norm_bias=post_norm_bias,
        **_projections(f"{prefix}.self_attn", hidden),
        cross=_cross_specs(prefix, hidden) if layer.cross is not None else None,
        mlp=_mlp_specs(f"{prefix}.ffn", layer.mlp_hidden, hidden) if layer.mlp_hidden is not None else None,
        router=None if layer.router is None else TensorSpec(f"{prefix}.ffn.router.classifier.weight", (config.num_experts, hidden)),
    )


def _projections(module: str, hidden: int) -> dict[str, Any]:
    specs = {}
    for name, stored in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        specs[name], specs[f"{name}_bias"] = _affine_specs(f"{module}.{stored}", (hidden, hidden))
    return specs


def _cross_specs(prefix: str, hidden: int) -> CrossWeights[TensorSpec]:
    norm, norm_bias = _affine_specs(f"{prefix}.cross_attention_layer_norm", (hidden,), "ones")
    return CrossWeights(norm=norm, norm_bias=norm_bias, **_projections(f"{prefix}.cross_attention", hidden))


def _mlp_specs(module: str, width: int, hidden: int) -> MlpWeights[TensorSpec]:
    up, up_bias = _affine_specs(f"{module}.fc1", (width, hidden))
    down, down_bias = _affine_specs(f"{module}.fc2", (hidden, width))
    return MlpWeights(gate=None, up=up, up_bias=up_bias, down=down, down_bias=down_bias)


def _affine_specs(module: str, shape: tuple[int, ...], init: str = "normal") -> tuple[TensorSpec, TensorSpec]:
    """Weight and bias."""
    return TensorSpec(f"{module}.weight", shape, init), TensorSpec(f"{module}.bias", shape[:1])
