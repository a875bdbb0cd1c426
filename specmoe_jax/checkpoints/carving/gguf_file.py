"""GGUF files (llama.cpp) of dense Llama models: config, weights and tokenizer in Hugging Face's terms.

The file is parsed, and its quantised tensors are decoded, by the `gguf` package (optional extra `carve`).
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from specmoe_jax.checkpoints.header import quote
from specmoe_jax.support.errors import CheckpointError, RequestError

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types that are matched as a whole, before the text is split
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GgufFile(NamedTuple):
    """fields: the metadata. tensors: by Hugging Face name, as the reader of the package gives them."""

    name: str
    fields: dict
    tensors: dict


def read(path: pathlib.Path) -> GgufFile:
    """Parses the file; tensors stay on disk. Raises CheckpointError, or RequestError where the package is missing."""
    try:
        import gguf
    except ImportError:
        raise RequestError('a GGUF file needs the gguf package; install it: pip install "gguf>=0.17"') from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as e:
        raise CheckpointError(f"{path.name}: not a GGUF file that the gguf package reads ({' '.join(str(e).split())[:100]})") from e
    return GgufFile(name=path.name, fields=fields, tensors={_hugging_face_name(t.name): t for t in reader.tensors})


def config(file: GgufFile) -> dict:
    """The config.json that such a model would have. Raises CheckpointError for another architecture or a scaled rope."""
    if file.fields.get("general.architecture") != "llama":
        raise CheckpointError(
            f"{file.name}: architecture {quote(str(file.fields.get('general.architecture')))}; GGUF files are read of llama alone"
        )
    if file.fields.get("llama.rope.scaling.type", "none") != "none" or file.fields.get("llama.expert_count", 0):
        raise CheckpointError(f"{file.name}: has a scaled rope or experts; expected a plain dense llama")
    hidden, heads = _field(file, "llama.embedding_length"), _field(file, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": file.fields.get("llama.vocab_size", len(_field(file, "tokenizer.ggml.tokens"))),
        "hidden_size": hidden,
        "intermediate_size": _field(file, "llama.feed_forward_length"),
        "num_hidden_layers": _field(file, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.fields.get("llama.attention.head_count_kv", heads),
        "head_dim": file.fields.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _field(file, "llama.context_length"),
        "rms_norm_eps": float(f"{_field(file, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 was stored as float32
        "rope_theta": file.fields.get("llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
    }


def tensor_names(file: GgufFile) -> list[str]:
    """In Hugging Face's terms; a name that has none there stays as it is."""
    return list(file.tensors)


def tensor(file: GgufFile, name: str) -> np.ndarray:
    """A tensor decoded to float32, in Hugging Face's layout. Raises CheckpointError."""
    from gguf import quants

    stored = file.tensors[name]
    try:
        array = quants.dequantize(stored.data, stored.tensor_type)
    except (NotImplementedError, ValueError) as e:
        raise CheckpointError(f"{file.name}: tensor {quote(stored.name)}: {stored.tensor_type.name} cannot be decoded ({e})") from e
    array = np.ascontiguousarray(array, np.float32).reshape(tuple(int(n) for n in stored.shape[::-1]))
    if not np.isfinite(array).all():
        raise CheckpointError(f"{file.name}: tensor {quote(stored.name)}: holds NaN or Inf; expected finite weights")
    for suffix, heads in (("q_proj.weight", "num_attention_heads"), ("k_proj.weight", "num_key_value_heads")):
        if name.endswith(suffix):
            return _unpermuted(array, config(file)[heads])
    return array


def _unpermuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each head interleaved, since it rotates neighbours; Hugging Face rotates halves."""
    return np.ascontiguousarray(matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape))


def write_tokenizer(file: GgufFile, folder: pathlib.Path) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json. Raises CheckpointError."""
    tokens = _field(file, "tokenizer.ggml.tokens")
    backend = tokenizer(file)
    backend.save(str(folder / "tokenizer.json"))
    named = {name: file.fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL_TOKENS.items()}
    raw = {name: tokens[token_id] for name, token_id in named.items() if token_id is not None}
    raw |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in file.fields:
        raw["chat_template"] = file.fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
    ids = {f"{key}_token_id": file.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """The byte-level BPE of the metadata. Raises CheckpointError for other kinds."""
    kind, splitter = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or splitter not in _SPLITTERS:
        raise CheckpointError(
            f"{file.name}: tokenizer {quote(str(kind))}, split by {quote(str(splitter))}; "
            f"read are gpt2 with {', '.join(_SPLITTERS)}"
        )
    tokens, merges = _field(file, "tokenizer.ggml.tokens"), _field(file, "tokenizer.ggml.merges")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    backend.pre_tokenizer, backend.decoder = _SPLITTERS[splitter](), decoders.ByteLevel()
    types = file.fields.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens([token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL])
    whole = [token for token, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in whole])
    if file.fields.get("tokenizer.ggml.add_bos_token"):
        bos_id = _field(file, "tokenizer.ggml.bos_token_id")
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return backend


def _splitter(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """GPT-2's: a regular expression, then bytes."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


_SPLITTERS = {
    "gpt-2": _splitter,
    "smollm": lambda: _splitter(pre_tokenizers.Digits(individual_digits=True)),
}


def _field(file: GgufFile, name: str):
    if name not in file.fields:
        raise CheckpointError(f"{file.name}: metadata {quote(name)}: missing")
    return file.fields[name]


def _hugging_face_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return _NAMES.get(name, name)
