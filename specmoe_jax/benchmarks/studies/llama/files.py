"""A random Qwen3-MoE checkpoint, its mapped form, and the same weights as GGUF files of llama.cpp's types.

GGUF is written by the registry's `gguf` package: matrices in the type that is asked for, norms and routers in float32.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator

import gguf
import numpy as np
import torch
from safetensors import safe_open

from specmoe_jax.benchmarks.studies.published.checkpoints import QWEN3, qwen3, write_shards
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.loader import checkpoint_path

# 2.98 GB in bfloat16, of which a token reads 0.51. The vocabulary is the bundled model's, whose tokenizer is copied beside the
# weights: the model can be served.
REAL = QWEN3 | {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_attention_heads": 16, "num_hidden_layers": 14, "vocab_size": 5120,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
}  # fmt: skip
# head: 2 layers of 64 experts x 768 under an embedding and a head of 151,936 x 2,048. varied: real, but each token goes to experts
# of its own, where else the context decides and a row keeps its experts. small: for trials.
SHAPES = {"real": REAL, "head": QWEN3, "varied": REAL, "small": REAL | {"num_hidden_layers": 2}}
EMBEDDING_SCALES = {"varied": 50.0}
Quantization = gguf.GGMLQuantizationType
TYPES = {
    "f32": (Quantization.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (Quantization.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (Quantization.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Quantization.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Quantization.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
OF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
OF_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
KEPT = ("norm", "gate_inp")  # in float32, as llama.cpp's own converter keeps them


def checkpoint(folder: pathlib.Path, shape: str) -> pathlib.Path:
    """A directory in the published form, bfloat16; made where it is not there."""
    path = folder / shape
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        write_shards(qwen3(SHAPES[shape], embedding_scale=EMBEDDING_SCALES.get(shape, 1.0)), path)
        if SHAPES[shape]["vocab_size"] == REAL["vocab_size"]:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(checkpoint_path("demo") / name, path / name)
        (path / "config.json").write_text(json.dumps(SHAPES[shape]))
    return path


def mapped(folder: pathlib.Path, shape: str, dtype: str) -> pathlib.Path:
    """Its converted form, which is mapped."""
    path = folder / f"{shape}-{dtype}"
    if not path.exists():
        convert(str(checkpoint(folder, shape)), path, to="specmoe", dtype=dtype)
    return path


def gguf_file(folder: pathlib.Path, shape: str, kind: str) -> pathlib.Path:
    path = folder / f"{shape}-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        _write(checkpoint(folder, shape), SHAPES[shape], kind, partial)
        partial.rename(path)
    return path


def _write(source: pathlib.Path, c: dict, kind: str, path: pathlib.Path) -> None:
    quantization, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _describe(writer, c, file_type)
    names = list(_names(c))
    weights = Weights(source)
    for name, stored in names:
        shape, own = weights.shape(stored), _type_of(name, quantization)
        size = gguf.quant_shape_to_byte_shape(shape, own) if own in gguf.GGML_QUANT_SIZES else shape
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, stored in names:
        writer.write_tensor_data(gguf.quantize(weights.read(stored), _type_of(name, quantization)).view(np.uint8))
    writer.close()


def _describe(writer: gguf.GGUFWriter, c: dict, file_type: gguf.LlamaFileType) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_expert_count(c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _names(c: dict) -> Iterator[tuple[str, list[str]]]:
    """GGUF's name of each tensor, and those of the checkpoint that it is stacked of."""
    yield "token_embd.weight", ["model.embed_tokens.weight"]
    yield "output_norm.weight", ["model.norm.weight"]
    yield "output.weight", ["lm_head.weight"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, stored in OF_LAYER.items():
            yield f"blk.{layer}.{name}.weight", [f"{prefix}{stored}.weight"]
        for name, stored in OF_EXPERTS.items():
            yield f"blk.{layer}.{name}.weight", [f"{prefix}mlp.experts.{e}.{stored}.weight" for e in range(c["num_experts"])]


def _type_of(name: str, quantization: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    return Quantization.F32 if any(part in name for part in KEPT) else quantization


class Weights:
    """Tensors of a directory by name, stacked where there are several."""

    def __init__(self, folder: pathlib.Path):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self._files = {file: safe_open(folder / file, framework="pt") for file in set(index.values())}
        self._index = index

    def shape(self, names: list[str]) -> tuple[int, ...]:
        shape = tuple(self._files[self._index[names[0]]].get_slice(names[0]).get_shape())
        return shape if len(names) == 1 else (len(names), *shape)

    def read(self, names: list[str]) -> np.ndarray:
        found = [self._files[self._index[name]].get_tensor(name).to(torch.float32).numpy() for name in names]
        return found[0] if len(found) == 1 else np.stack(found)
