"""GLM-5, 5.1 and 5.2 (Zhipu AI 2026): DeepSeek-V3.2's mathematics and names, without groups; its dense layers may be listed.

GLM-5.2 has layers that attend what the indexer of an earlier layer chose for the same token.
"""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.families.sparse import deepseek_v32
from specmoe_jax.models.published.config_json import named_layers, num_layers, show, size
from specmoe_jax.models.published.parse import listed_dense
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "GlmMoeDsaForCausalLM"
KINDS = ("full", "shared")  # of a layer: it has an indexer, or takes what the last one before it chose

weight_specs, expert_layouts = deepseek_v32.weight_specs, deepseek_v32.expert_layouts
canonical_name = deepseek_v32.canonical_name


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    kinds = _kinds(raw)

    def attention_of(layer: int, attention: AttentionConfig) -> AttentionConfig:
        own = deepseek_v32.indexed(raw, attention, heads=32, interleaved=True)
        hands_on = kinds[layer + 1 : layer + 2] == ("shared",)
        if kinds[layer] == "full":
            return dataclasses.replace(own, hands_on=hands_on)
        return dataclasses.replace(attention, taken=own.kept, hands_on=hands_on)

    return deepseek_v3.latent_model(
        raw,
        family="glm_moe_dsa",
        dense=listed_dense(raw, default=3),
        scaling=2.5,
        default_eps=1e-5,
        attention_of=attention_of,
    )


def further_layer(config: ModelConfig) -> LayerConfig:
    """Of the layer for further tokens, which has an indexer of its own."""
    attention = next(layer.attention for layer in reversed(config.layers) if layer.attention.indexer is not None)
    return dataclasses.replace(config.layers[config.moe_layers[-1]], attention=dataclasses.replace(attention, hands_on=False))


def _kinds(raw: dict) -> tuple[str, ...]:
    """Of every layer: as listed, by a pattern of letters, or by a period (transformers' rules)."""
    count = num_layers(raw)
    kinds = named_layers(raw, "indexer_types", count, KINDS) or _by_rule(raw, count)
    if kinds[0] != "full":
        raise CheckpointError("config.json: the first layer has no indexer, and there is none before it to share")
    return kinds


def _by_rule(raw: dict, count: int) -> tuple[str, ...]:
    pattern = raw.get("index_topk_pattern")
    if pattern is None:
        period, offset = size(raw, "index_topk_freq", default=1), size(raw, "index_skip_topk_offset", default=2)
        return tuple(KINDS[int(max(layer - offset + 1, 0) % period > 0)] for layer in range(count))
    if not isinstance(pattern, str) or len(pattern) != count or set(pattern) - set("FS"):
        raise CheckpointError(f"config.json: index_topk_pattern is {show(pattern)}; it must be {count} of the letters F and S")
    return tuple(KINDS["FS".index(letter)] for letter in pattern)
