"""Tensor names that families share, as specs: attention, MLPs and the layouts in which experts are stored."""

from typing import Any

import numpy as np

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.spec import (
    IndexerWeights,
    LayerWeights,
    Layout,
    MlpWeights,
    Part,
    RecurrentWeights,
    TensorSpec,
    Weights,
    down_bias_of,
    down_of,
    gate_of,
    outer_of,
    up_of,
)

# Experts of a layer, one tensor for each of the three matrices: how GGUF files have them. No other publisher names them so.
STACKED = {kind: f"mlp.experts.{kind}_stack" for kind in ("gate", "up", "down")}


def model_specs(config: ModelConfig, layer_specs) -> Weights[TensorSpec]:
    """Specs of everything but the routed experts. layer_specs: (config, layer) -> LayerWeights."""
    vocab_by_model = (config.vocab_size, config.hidden_size)
    return Weights(
        embed=TensorSpec("model.embed_tokens.weight", vocab_by_model),
        layers=tuple(layer_specs(config, layer) for layer in range(config.num_layers)),
        final_norm=TensorSpec("model.norm.weight", (config.hidden_size,), "ones"),
        lm_head=None if config.tie_embeddings else TensorSpec("lm_head.weight", vocab_by_model),
    )


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What the names of layers that predict further tokens begin with: they are counted on after the last layer."""
    return tuple(f"model.layers.{config.num_layers + i}." for i in range(config.mtp_layers))


def attention_specs(
    config: ModelConfig, layer: int, *, qkv_bias: bool = False, o_bias: bool = False, **others
) -> LayerWeights[TensorSpec]:
    """The two norms and the projections under their usual names; `others` are further fields of LayerWeights."""
    attention, hidden = config.layers[layer].attention, config.hidden_size
    prefix = f"model.layers.{layer}"
    q, kv = attention.num_heads * attention.query_dim, attention.num_kv_heads * attention.head_dim
    values = attention.num_kv_heads * attention.output_dim

    def bias(name: str, width: int, wanted: bool) -> TensorSpec | None:
        return TensorSpec(f"{prefix}.self_attn.{name}_proj.bias", (width,)) if wanted else None

    return LayerWeights(
        input_norm=norm_spec(f"{prefix}.input_layernorm", hidden),
        post_norm=norm_spec(f"{prefix}.post_attention_layernorm", hidden),
        q=TensorSpec(f"{prefix}.self_attn.q_proj.weight", (q, hidden)),
        k=TensorSpec(f"{prefix}.self_attn.k_proj.weight", (kv, hidden)),
        v=TensorSpec(f"{prefix}.self_attn.v_proj.weight", (values, hidden)),
        o=TensorSpec(f"{prefix}.self_attn.o_proj.weight", (hidden, attention.num_heads * attention.output_dim)),
        q_bias=bias("q", q, qkv_bias),
        k_bias=bias("k", kv, qkv_bias),
        v_bias=bias("v", values, qkv_bias),
        o_bias=bias("o", hidden, o_bias),
        **others,
    )


def qk_norm_specs(config: ModelConfig, layer: int, *, full: bool) -> dict[str, Any]:
    """Norms of queries and keys: over one head, or over the whole projection."""
    attention, prefix = config.layers[layer].attention, f"model.layers.{layer}.self_attn"
    q_heads, k_heads = (attention.num_heads, attention.num_kv_heads) if full else (1, 1)
    return {
        "q_norm": norm_spec(f"{prefix}.q_norm", q_heads * attention.head_dim),
        "k_norm": norm_spec(f"{prefix}.k_norm", k_heads * attention.head_dim),
    }


def router_spec(config: ModelConfig, layer: int, module: str = "mlp.gate") -> TensorSpec | None:
    """[E, M]; None for a dense layer."""
    router = config.layers[layer].router
    name = f"model.layers.{layer}.{module}.weight"
    return None if router is None else TensorSpec(name, (router.num_experts, config.hidden_size))


def choice_bias_spec(config: ModelConfig, layer: int, module: str = "mlp.gate") -> TensorSpec | None:
    """[E], of the router's choice; None for a dense layer. Published in float32 beside bfloat16 weights, and kept so."""
    router = config.layers[layer].router
    name = f"model.layers.{layer}.{module}.e_score_correction_bias"
    return None if router is None else TensorSpec(name, (router.num_experts,), keep="float32")


def latent_specs(config: ModelConfig, layer: int, **others) -> LayerWeights[TensorSpec]:
    """The two norms and the projections of latent attention; `others` are further fields of LayerWeights."""
    kind, hidden = config.layers[layer], config.hidden_size
    latent, num_heads, rank = kind.attention.latent, kind.attention.num_heads, config.query_rank
    assert latent is not None
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    q_name, q_input = ("q_proj", hidden) if rank is None else ("q_b_proj", rank)
    return LayerWeights(
        input_norm=norm_spec(f"{prefix}.input_layernorm", hidden),
        post_norm=norm_spec(f"{prefix}.post_attention_layernorm", hidden),
        q_a=None if rank is None else TensorSpec(f"{attention}.q_a_proj.weight", (rank, hidden)),
        q_a_norm=None if rank is None else norm_spec(f"{attention}.q_a_layernorm", rank),
        q=TensorSpec(f"{attention}.{q_name}.weight", (num_heads * (latent.nope + latent.rope), q_input)),
        k=None,
        v=None,
        kv_a=TensorSpec(f"{attention}.kv_a_proj_with_mqa.weight", (latent.rank + latent.rope, hidden)),
        kv_a_norm=norm_spec(f"{attention}.kv_a_layernorm", latent.rank),
        kv_b=TensorSpec(f"{attention}.kv_b_proj.weight", (num_heads * (latent.nope + latent.value), latent.rank)),
        indexer=_indexer_specs(config, layer),
        o=TensorSpec(f"{attention}.o_proj.weight", (hidden, num_heads * latent.value)),
        **others,
    )


def _indexer_specs(config: ModelConfig, layer: int) -> IndexerWeights[TensorSpec] | None:
    """DeepSeek-V3.2's names; None for a layer without."""
    indexer, rank, prefix = config.layers[layer].attention.indexer, config.query_rank, f"model.layers.{layer}.self_attn.indexer"
    if indexer is None:
        return None
    assert rank is not None  # it reads the compressed queries
    return IndexerWeights(
        q=TensorSpec(f"{prefix}.wq_b.weight", (indexer.heads * indexer.dim, rank)),
        k=TensorSpec(f"{prefix}.wk.weight", (indexer.dim, config.hidden_size)),
        k_norm=norm_spec(f"{prefix}.k_norm", indexer.dim),
        k_norm_bias=TensorSpec(f"{prefix}.k_norm.bias", (indexer.dim,)),
        heads=TensorSpec(f"{prefix}.weights_proj.weight", (indexer.heads, config.hidden_size)),
    )


def recurrent_specs(config: ModelConfig, layer: int, **others) -> LayerWeights[TensorSpec]:
    """The two norms and all of a Gated DeltaNet (Qwen's names); `others` are further fields of LayerWeights."""
    recurrence, hidden, prefix = config.layers[layer].attention.recurrent, config.hidden_size, f"model.layers.{layer}"
    assert recurrence is not None
    heads, outputs = recurrence.value_heads, recurrence.value_heads * recurrence.value

    def projection(name: str, width: int) -> TensorSpec:
        return TensorSpec(f"{prefix}.linear_attn.in_proj_{name}.weight", (width, hidden))

    def number(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{prefix}.linear_attn.{name}", shape, keep="float32")

    if recurrence.by_key_head:
        q, z = projection("qkvz", recurrence.channels + outputs), None
        b, a = projection("ba", 2 * heads), None
    else:
        q, z = projection("qkv", recurrence.channels), projection("z", outputs)
        b, a = projection("b", heads), projection("a", heads)
    return LayerWeights(
        input_norm=norm_spec(f"{prefix}.input_layernorm", hidden),
        post_norm=norm_spec(f"{prefix}.post_attention_layernorm", hidden),
        q=q,
        k=None,
        v=None,
        o=TensorSpec(f"{prefix}.linear_attn.out_proj.weight", (hidden, outputs)),
        recurrent=RecurrentWeights(
            z=z,
            b=b,
            a=a,
            conv=TensorSpec(f"{prefix}.linear_attn.conv1d.weight", (recurrence.channels, 1, recurrence.taps)),
            decay=number("A_log", heads),
            step=number("dt_bias", heads),
            norm=TensorSpec(f"{prefix}.linear_attn.norm.weight", (recurrence.value,), "ones", keep="float32"),
        ),
        **others,
    )


def shared_expert_specs(config: ModelConfig, layer: int) -> MlpWeights[TensorSpec] | None:
    """The MLP of a dense layer, or the shared experts of another as one ungated MLP (DeepSeek's names)."""
    return mlp_specs(config, layer, "mlp" if config.layers[layer].router is None else "mlp.shared_experts")


def mlp_specs(config: ModelConfig, layer: int, module: str) -> MlpWeights[TensorSpec] | None:
    """A dense MLP or shared expert; None for a layer without."""
    width, hidden = config.layers[layer].mlp_hidden, config.hidden_size
    if width is None:
        return None
    module = f"model.layers.{layer}.{module}"
    return MlpWeights(
        gate=TensorSpec(f"{module}.gate_proj.weight", (width, hidden)),
        up=TensorSpec(f"{module}.up_proj.weight", (width, hidden)),
        down=TensorSpec(f"{module}.down_proj.weight", (hidden, width)),
    )


def norm_spec(module: str, width: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", (width,), "ones")


def separate_layout(experts: ExpertConfig, prefix: str, gate: str, up: str, down: str) -> Layout:
    """One tensor a matrix, `prefix` ending in the expert's number: what is published."""
    wide = (experts.hidden, experts.model)
    return (
        Part(TensorSpec(f"{prefix}.{gate}.weight", wide), gate_of),
        Part(TensorSpec(f"{prefix}.{up}.weight", wide), up_of),
        Part(TensorSpec(f"{prefix}.{down}.weight", wide[::-1]), down_of),
    )


def fused_layout(
    experts: ExpertConfig, num_experts: int, prefix: str, expert: int, names: tuple[str, str] = ("gate_up_proj", "down_proj")
) -> Layout:
    """All experts of a layer in two tensors, as newer writers may fuse them; gate is the first half of gate_up."""
    hidden, model = experts.hidden, experts.model
    return (
        Part(TensorSpec(f"{prefix}.{names[0]}", (num_experts, 2 * hidden, model)), gate_up_of, expert),
        Part(TensorSpec(f"{prefix}.{names[1]}", (num_experts, model, hidden)), down_of, expert),
    )


def transposed_layout(experts: ExpertConfig, num_experts: int, prefix: str, expert: int) -> Layout:
    """As fused, but stored [in, out] (Llama-4)."""
    hidden, model = experts.hidden, experts.model
    return (
        Part(TensorSpec(f"{prefix}.gate_up_proj", (num_experts, model, 2 * hidden)), gate_up_transposed_of, expert),
        Part(TensorSpec(f"{prefix}.down_proj", (num_experts, hidden, model)), down_transposed_of, expert),
    )


def stacked_layout(config: ModelConfig, layer: int, expert: int) -> Layout:
    """All experts of a layer in a tensor for each matrix, and one for each bias where there are any (GGUF, of every family)."""
    experts, count, prefix = config.experts, config.num_experts, f"model.layers.{layer}"
    wide, tall = (count, experts.hidden, experts.model), (count, experts.model, experts.hidden)
    gate, up, down = (f"{prefix}.{STACKED[kind]}" for kind in ("gate", "up", "down"))
    if not experts.biased:
        return (
            Part(TensorSpec(gate, wide), gate_of, expert),
            Part(TensorSpec(up, wide), up_of, expert),
            Part(TensorSpec(down, tall), down_of, expert),
        )
    return (
        Part(TensorSpec(gate, wide), lambda block: block[0, :-1, :-1], expert),
        Part(TensorSpec(up, wide), lambda block: block[1, :-1, :-1], expert),
        Part(TensorSpec(down, tall), outer_of, expert),
        Part(TensorSpec(f"{gate}_bias", wide[:2]), lambda block: block[0, :-1, -1], expert),
        Part(TensorSpec(f"{up}_bias", wide[:2]), lambda block: block[1, :-1, -1], expert),
        Part(TensorSpec(f"{down}_bias", tall[:2]), down_bias_of, expert),
    )


def gate_up_of(block: np.ndarray) -> np.ndarray:
    """[2, F, M]: gate, then up."""
    return block[:2]


def gate_up_transposed_of(block: np.ndarray) -> np.ndarray:
    """[M, 2, F]."""
    return block[:2].transpose(2, 0, 1)


def down_transposed_of(block: np.ndarray) -> np.ndarray:
    """[F, M]."""
    return block[2]


def swiglu_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """The two layouts of all families that call an expert's matrices gate_proj, up_proj and down_proj."""
    prefix = f"model.layers.{layer}.mlp.experts"
    return (
        separate_layout(config.experts, f"{prefix}.{expert}", "gate_proj", "up_proj", "down_proj"),
        fused_layout(config.experts, config.num_experts, prefix, expert),
    )
