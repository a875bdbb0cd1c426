"""Small mixtures of experts as GGUF files, as llama.cpp's converter would write them, and as Hugging Face directories.

Both hold the same numbers: what the blocks of the GGUF file decode to by the `gguf` package.
"""

import json

import gguf
import numpy as np
import safetensors.numpy
from small_checkpoint_files import train_tokenizer

from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import random_tensor, spec_leaves

_SIZES = {"vocab_size": 330, "hidden_size": 64, "max_position_embeddings": 128, "eos_token_id": 2, "hidden_act": "silu"}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LATENT = _SIZES | {
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "attention_bias": False,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1e4,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
CONFIGS = {  # by architecture in llama.cpp's words, the second of deepseek2 with sigmoid
    "llama": _SIZES | _GROUPED | {
        "architectures": ["MixtralForCausalLM"], "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 5,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
    },
    "qwen2moe": _SIZES | _GROUPED | {
        "architectures": ["Qwen2MoeForCausalLM"], "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 96, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True, "use_sliding_window": False,
    },
    "qwen3moe": _SIZES | _GROUPED | {
        "architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "attention_bias": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "deepseek2": _LATENT | {
        "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
    "deepseek2-v3": _LATENT | {
        "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.827,
    },
    "gpt-oss": _SIZES | _GROUPED | {
        "architectures": ["GptOssForCausalLM"], "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 5,
        "num_experts_per_tok": 2, "sliding_window": 6, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "rope_scaling": _YARN | {"truncate": False},
    },
}  # fmt: skip
_MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.sinks": "attn_sinks.weight", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
}  # fmt: skip
_MODULES |= {f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
_MODULES |= {f"mlp.shared_expert{s}.{kind}_proj": f"ffn_{kind}_shexp" for kind in ("gate", "up", "down") for s in ("", "s")}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
}  # fmt: skip


def encode(array, kind: str, rng):
    """(bytes of the blocks, what they decode to). Of the types that the package cannot make, random blocks of a like size."""
    quant = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4"):
        blocks = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), quant)
    else:
        values, size = gguf.GGML_QUANT_SIZES[quant]
        blocks = rng.integers(0, 256, (*array.shape[:-1], array.shape[-1] // values, size), np.uint8)
        scale = np.float16(0.002 / np.sqrt(array.shape[-1]))
        at = {"Q6_K": (size - 2,), "Q3_K": (size - 2,), "Q2_K": (size - 4, size - 2), "IQ4_NL": (0,)}.get(kind, (0, 2))
        for start in at:
            blocks[..., start : start + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks = blocks.reshape(*array.shape[:-1], -1)
    return blocks, gguf.quants.dequantize(blocks, quant).reshape(array.shape).astype(np.float32)


def write_pair(folder, architecture: str, *, sizes=None, experts=("Q8_0", "Q8_0", "Q8_0"), others="F16", cut=False, **options):
    """-> (file.gguf, Hugging Face directory) of one random model.

    sizes: over CONFIGS. experts: ggml types of gate, up and down; a function of the layer gives others to each. cut: the second
    projection of latent attention as two tensors. options: metadata, tokenizer ("bpe" or "sentencepiece") and split of the file.
    """
    raw, name = CONFIGS[architecture] | (sizes or {}), architecture.removesuffix("-v3")
    config = parse_config(raw)
    rng, ours, theirs = np.random.default_rng(0), {}, {}
    for spec in spec_leaves(family_of(config).weight_specs(config)):
        array = random_tensor(spec, 0)
        array = array if spec.init == "normal" else 1 + rng.standard_normal(spec.shape).astype(np.float32) / 4
        exact = len(spec.shape) < 2 or "gate" in spec.name.split(".")[-2] or "router" in spec.name
        _, theirs[spec.name] = encode(array, "F32" if exact else others, rng)
        for own, tensor in _converted(name, spec.name, theirs[spec.name], config, cut):
            ours[own] = encode(tensor, "F32" if exact else others, rng)[0], "F32" if exact else others
    for layer in config.expert_layers:
        types = experts(layer) if callable(experts) else experts
        ours_here, theirs_here = _experts(config, raw, layer, types, rng)
        ours, theirs = ours | ours_here, theirs | theirs_here
    directory = folder / "directory"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    train_tokenizer().save(str(directory / "tokenizer.json"))
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in theirs.items()}, directory / "model.safetensors")
    file = folder / "model.gguf"
    _write(file, name, _metadata(name, raw, cut) | options.get("metadata", {}), ours, options.get("split", 0))
    return (next(folder.glob("model-00001-*.gguf")) if options.get("split") else file), directory


def _converted(architecture: str, name: str, array, config, cut: bool):
    if name in _OUTER:
        return [(_OUTER[name], array)]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    if rest in _MODULES:
        return [(f"blk.{layer}.{_MODULES[rest]}", array)]
    own = f"blk.{layer}.{_MODULES[module]}.{kind}"
    if architecture == "gpt-oss" and module == "post_attention_layernorm":
        own = f"blk.{layer}.post_attention_norm.{kind}"
    if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_heads if module == "self_attn.q_proj" else config.num_kv_heads
        array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if module == "mlp.shared_expert_gate":
        array = array[0]
    if cut and module == "self_attn.kv_b_proj":
        latent = config.layers[0].attention.latent
        both = array.reshape(config.num_heads, latent.nope + latent.value, latent.rank)
        keys, values = both[:, : latent.nope].swapaxes(1, 2), both[:, latent.nope :]
        return [(f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(keys)), (f"blk.{layer}.attn_v_b.weight", values)]
    return [(own, array)]


def _experts(config, raw, layer: int, types, rng):
    """The stacks of a layer, and the same in the published names of the family."""
    count, hidden, model = config.num_experts, config.expert_hidden, config.hidden_size
    ours, decoded = {}, {}
    for kind, ggml in zip(("gate", "up", "down"), types, strict=True):
        rows, columns = (model, hidden) if kind == "down" else (hidden, model)
        array = rng.standard_normal((count, rows, columns)).astype(np.float32) / np.sqrt(columns)
        blocks, decoded[kind] = encode(array, ggml, rng)
        ours[f"blk.{layer}.ffn_{kind}_exps.weight"] = blocks, ggml
    prefix = f"model.layers.{layer}"
    if config.family == "gpt_oss":
        biases = {kind: rng.standard_normal((count, model if kind == "down" else hidden)).astype(np.float32) for kind in decoded}
        ours |= {f"blk.{layer}.ffn_{kind}_exps.bias": (bias, "F32") for kind, bias in biases.items()}
        pairs = np.stack([decoded["gate"], decoded["up"]], axis=2).reshape(count, 2 * hidden, model)
        return ours, {
            f"{prefix}.mlp.experts.gate_up_proj": pairs.swapaxes(1, 2),
            f"{prefix}.mlp.experts.down_proj": decoded["down"].swapaxes(1, 2),
            f"{prefix}.mlp.experts.gate_up_proj_bias": np.stack([biases["gate"], biases["up"]], axis=2).reshape(count, -1),
            f"{prefix}.mlp.experts.down_proj_bias": biases["down"],
        }
    module, names = ("mlp", {kind: f"{kind}_proj" for kind in decoded})
    if config.family == "mixtral":
        module, names = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    return ours, {f"{prefix}.{module}.experts.{e}.{names[kind]}.weight": decoded[kind][e] for kind in decoded for e in range(count)}


def _metadata(architecture: str, raw: dict, cut: bool) -> dict:
    """What llama.cpp's converter says of a config.json."""
    own = {
        "block_count": raw["num_hidden_layers"], "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"], "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"], "rope.freq_base": float(raw["rope_theta"]),
        "expert_count": next(raw[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in raw),
        "expert_used_count": raw["num_experts_per_tok"],
    }  # fmt: skip
    if "head_dim" in raw:
        own |= {"attention.key_length": raw["head_dim"], "attention.value_length": raw["head_dim"]}
        own |= {"rope.dimension_count": raw["head_dim"]}
    if "moe_intermediate_size" in raw or architecture == "gpt-oss":
        own["expert_feed_forward_length"] = raw.get("moe_intermediate_size", raw["intermediate_size"])
    if "shared_expert_intermediate_size" in raw:
        own["expert_shared_feed_forward_length"] = raw["shared_expert_intermediate_size"]
    if architecture == "gpt-oss":
        own["attention.sliding_window"] = raw["sliding_window"]
    if rope := raw.get("rope_scaling"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        if rope["rope_type"] == "yarn":
            own["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{architecture}.{key}": value for key, value in (own | (_latent(raw, cut) if "kv_lora_rank" in raw else {})).items()}


def _latent(raw: dict, cut: bool) -> dict:
    nope, rope, value, rank = (raw[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    lengths = {"attention.key_length": nope + rope, "attention.value_length": value}
    if cut:  # those of the latent form then stand under the usual keys
        lengths = {
            "attention.key_length": rank + rope, "attention.value_length": rank, "attention.key_length_mla": nope + rope,
            "attention.value_length_mla": value, "attention.head_count_kv": 1,
        }  # fmt: skip
    sigmoid = raw["architectures"] == ["DeepseekV3ForCausalLM"]
    return lengths | {
        "attention.kv_lora_rank": rank, "rope.dimension_count": rope, "expert_shared_count": raw["n_shared_experts"],
        "leading_dense_block_count": raw["first_k_dense_replace"], "expert_weights_scale": raw["routed_scaling_factor"],
        "expert_weights_norm": raw["norm_topk_prob"], "expert_gating_func": 2 if sigmoid else 1,
        "rope.scaling.yarn_log_multiplier": 0.1 * raw["rope_scaling"]["mscale_all_dim"],
    } | ({"attention.q_lora_rank": raw["q_lora_rank"]} if raw["q_lora_rank"] else {}) | (
        {"expert_group_count": raw["n_group"], "expert_group_used_count": raw["topk_group"]} if sigmoid else {}
    )  # fmt: skip


def bpe_metadata() -> dict:
    """The tokenizer of small_checkpoint_files.train_tokenizer."""
    model = json.loads(train_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]], "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}", "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip


def _write(file, architecture: str, metadata: dict, tensors: dict, split: int) -> None:
    given = {key: value for key, value in (bpe_metadata() | metadata).items() if value is not None}
    writer = gguf.GGUFWriter(file, given.pop("general.architecture", architecture), split_max_tensors=split)
    for key, value in given.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        quant = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=quant if array.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
