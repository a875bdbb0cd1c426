"""Writes small dense Llama checkpoints: a Hugging Face directory, and the same weights as a GGUF file."""

import json

import numpy as np
import safetensors.numpy
from small_checkpoint_files import train_tokenizer

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 330,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
TEXTS = [f"It was the best of times {i}, it was the worst of times; naïve café {i * i}." for i in range(12)]
MATRICES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
}  # fmt: skip
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def dense_tensors(seed=0):
    """Random weights under Hugging Face's names; norms that are not 1, so that none may be forgotten."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(330, 16), "model.norm.weight": 1 + matrix(16) / 4}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in MATRICES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 1 + matrix(16) / 4
    return tensors


def write_dense(path, raw=RAW, tensors=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    train_tokenizer().save(str(path / "tokenizer.json"))
    safetensors.numpy.save_file(dense_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


def write_gguf(path, architecture="llama", changed=None):
    """The weights of `dense_tensors` as llama.cpp keeps them, with the tokenizer of `write_dense`. changed: metadata."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    tokenizer = json.loads(train_tokenizer().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(330)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre((changed or {}).get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in dense_tensors().items():
        writer.add_tensor(*_as_gguf(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(name, tensor):
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name], tensor
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    if module in ("self_attn.q_proj", "self_attn.k_proj"):  # neighbours instead of halves, as llama.cpp's converter does
        heads = 4 if module == "self_attn.q_proj" else 2
        tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, 16).swapaxes(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{GGUF_NAMES[module]}.weight", np.ascontiguousarray(tensor)
