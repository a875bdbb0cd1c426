"""The metadata of a GGUF file -> the config.json and generation_config.json that the model was published with."""

from collections.abc import Callable
from typing import Any

from specmoe_jax.checkpoints.gguf.metadata import GgufFile
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.config.model_config import LAYERS
from specmoe_jax.models.packing.kinds.gguf import TYPES
from specmoe_jax.models.published.naming import STACKED
from specmoe_jax.support.errors import CheckpointError

SIGMOID = 2  # llama.cpp's expert_gating_func; 1 or nothing is softmax
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def config_json(file: GgufFile) -> dict[str, Any]:
    """Of a mixture of experts. Raises CheckpointError for an architecture that is not built, or without experts."""
    build = _ARCHITECTURES.get(file.architecture)
    if build is None:
        raise CheckpointError(
            f"{file.name}: architecture {quote(file.architecture)}; GGUF files are read of {', '.join(_ARCHITECTURES)}: "
            "take the model's own repository (config.json, *.safetensors, tokenizer.json) if its family runs"
        )
    if not file.get("expert_count"):
        raise CheckpointError(
            f"{file.name}: a dense {file.architecture}, without experts; this engine runs mixtures of experts: specmoe carve cuts "
            "a dense llama into one"
        )
    return _common(file) | _experts(file) | build(file)


def packing_of(file: GgufFile, table: list[dict[str, Any]]) -> str | None:
    """How the experts of each layer are packed (ModelConfig.packing); None where a type of theirs is decoded when it is loaded.

    table: of names.rows.
    """
    types: dict[int, dict[str, str]] = {}
    for row in table:
        module = row["name"].partition("layers.")[2].partition(".")
        matrix = next((kind for kind, stack in STACKED.items() if module[2] == stack), None)
        if matrix is not None:
            types.setdefault(int(module[0]), {})[matrix] = row["dtype"]
    layers = [[own.get(matrix) for matrix in STACKED] for _, own in sorted(types.items())]
    if not layers or any(name not in TYPES for layer in layers for name in layer):
        return None
    names = [f"gguf:{','.join(map(str, layer))}" for layer in layers]
    return names[0] if len(set(names)) == 1 else LAYERS.join(names)


def dense_llama(file: GgufFile) -> dict[str, Any]:
    """Of a dense Llama, for carving. Raises CheckpointError for another architecture, a scaled rope or experts."""
    if file.architecture != "llama":
        raise CheckpointError(f"{file.name}: architecture {quote(file.architecture)}; dense GGUF files are read of llama alone")
    if file.get("rope.scaling.type", "none") != "none" or file.get("expert_count", 0):
        raise CheckpointError(f"{file.name}: has a scaled rope or experts; expected a plain dense llama")
    return _common(file) | {"architectures": ["LlamaForCausalLM"], "intermediate_size": file.own("feed_forward_length")}


def generation_config(file: GgufFile) -> dict[str, Any]:
    """Tokens and, where the file says how it wants to be sampled, that."""
    ends = [file.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = {"bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"), "eos_token_id": _end_ids(ends)}
    wishes = {theirs: file.fields.get(f"general.sampling.{ours}") for ours, theirs in _SAMPLING.items()}
    wishes = {name: _number(value) for name, value in wishes.items() if value is not None}
    return {name: value for name, value in ids.items() if value is not None} | wishes | ({"do_sample": True} if wishes else {})


def _end_ids(ends: list) -> int | list[int] | None:
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return None if not found else found[0] if len(found) == 1 else found


def _common(file: GgufFile) -> dict[str, Any]:
    """What all architectures have; what they do not say is left out."""
    heads, hidden = file.own("attention.head_count"), file.own("embedding_length")
    head_dim = file.get("attention.key_length")
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int):
        head_dim = hidden // max(1, heads)
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding else len(file.fields.get("tokenizer.ggml.tokens", ()))
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": file.own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.own("context_length"),
        "rms_norm_eps": _number(file.own("attention.layer_norm_rms_epsilon")),
        "rope_theta": _number(file.get("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
    } | _scaled_rope(file)


def _experts(file: GgufFile) -> dict[str, Any]:
    return {
        "num_experts": file.own("expert_count"),
        "num_experts_per_tok": file.own("expert_used_count"),
        "intermediate_size": file.get("feed_forward_length"),
        "moe_intermediate_size": file.get("expert_feed_forward_length"),
    }


def _scaled_rope(file: GgufFile) -> dict[str, Any]:
    kind = file.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{file.name}: rope.scaling.type is {quote(str(kind))}; built are none, linear and yarn")
    rope = {"rope_type": kind, "factor": _number(file.own("rope.scaling.factor"))}
    if kind == "yarn":
        given = {
            "original_max_position_embeddings": file.get("rope.scaling.original_context_length"),
            "beta_fast": file.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": file.get("rope.scaling.yarn_beta_slow"),
        }
        rope |= {key: value for key, value in given.items() if value is not None}
    return {"rope_scaling": rope}


def _mixtral(file: GgufFile) -> dict[str, Any]:
    hidden = file.get("expert_feed_forward_length") or file.own("feed_forward_length")
    return {"architectures": ["MixtralForCausalLM"], "intermediate_size": hidden, "sliding_window": None}


def _qwen2moe(file: GgufFile) -> dict[str, Any]:
    """llama.cpp does not store norm_topk_prob: it never renormalises here, as published."""
    shared = file.get("expert_shared_feed_forward_length")
    return {
        "architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": False, "qkv_bias": True, "use_sliding_window": False,
        "shared_expert_intermediate_size": shared if shared else file.own("feed_forward_length"),
    }  # fmt: skip


def _qwen3moe(file: GgufFile) -> dict[str, Any]:
    """llama.cpp does not store norm_topk_prob: it always renormalises here, as published."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "attention_bias": False, "use_sliding_window": False,
    }  # fmt: skip


def _deepseek2(file: GgufFile) -> dict[str, Any]:
    """DeepSeek-V2 with softmax, V3 (R1, Kimi-K2) with sigmoid. Older files do not say how experts are grouped: then not at all."""
    rope, value = file.own("rope.dimension_count"), file.get("attention.value_length_mla") or file.own("attention.value_length")
    whole = file.get("attention.key_length_mla") or file.own("attention.key_length")
    groups, chosen = file.get("expert_group_count") or 1, file.get("expert_group_used_count") or 1
    raw = {
        "num_key_value_heads": file.own("attention.head_count"),
        "kv_lora_rank": file.own("attention.kv_lora_rank"),
        "q_lora_rank": file.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": whole - rope,
        "v_head_dim": value,
        "head_dim": rope,
        "n_routed_experts": file.own("expert_count"),
        "n_shared_experts": file.own("expert_shared_count"),
        "first_k_dense_replace": file.get("leading_dense_block_count", 0),
        "routed_scaling_factor": _number(file.get("expert_weights_scale") or 1.0),
        "norm_topk_prob": bool(file.get("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": chosen,
        "attention_bias": False,
        "rope_interleave": True,
    }
    scaled = _sharpened(file)
    if file.get("expert_gating_func", 1) == SIGMOID:
        return raw | scaled | {"architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return (
        raw
        | scaled
        | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy" if groups == 1 else "group_limited_greedy"}
    )


def _sharpened(file: GgufFile) -> dict[str, Any]:
    """YaRN with scores that grow: the file has a tenth of mscale_all_dim, which equals mscale in all published models."""
    rope = _scaled_rope(file).get("rope_scaling")
    log_multiplier = file.get("rope.scaling.yarn_log_multiplier")
    if rope is None or log_multiplier is None:
        return {}
    mscale = _number(10 * log_multiplier)
    return {"rope_scaling": rope | {"mscale": mscale, "mscale_all_dim": mscale}}


def _gpt_oss(file: GgufFile) -> dict[str, Any]:
    raw = {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": file.own("expert_count"),
        "intermediate_size": file.own("expert_feed_forward_length"),
        "sliding_window": file.own("attention.sliding_window"),
        "attention_bias": True,
    }
    rope = _scaled_rope(file).get("rope_scaling")
    return raw if rope is None else raw | {"rope_scaling": rope | {"truncate": False}}  # as published; the file does not say


_ARCHITECTURES: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}


def _number(value: float) -> float:
    """A number that was stored as float32: 1e-05 again, not 9.99999974e-06."""
    return float(f"{value:.6g}")
