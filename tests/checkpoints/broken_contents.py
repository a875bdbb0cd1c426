"""Damages of names, shapes, configs, tokenizer and values, in files that are sound as files."""

import json
import math
import os

import numpy as np
import safetensors.numpy
from broken_corpus import CONFIG, EXPERT, MODEL, ROUTER, TOKENIZER, edit_config, edit_tensors, join_file, kind, split_file

# ---- names and shapes against config.json


@kind(MODEL, "missing", EXPERT)
def expert_missing(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop(EXPERT))


@kind(MODEL, EXPERT, "transposed")
def expert_transposed(path, rng):
    edit_tensors(path, lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)}))


@kind(MODEL, "missing", "model.norm.weight")
def norm_missing(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))


@kind(MODEL, "not use", "bias")
def unused_bias(path, rng):
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}))


@kind(MODEL, "two names")
def router_under_two_names(path, rng):
    edit_tensors(path, lambda t: t.update({ROUTER.replace("block_sparse_moe", "mlp"): t[ROUTER]}))


@kind(MODEL, "down_proj", "missing")
def half_fused(path, rng):
    shape = (3, 48, 16)
    edit_tensors(path, lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, np.float32)}))


@kind(MODEL, "q_proj", "config.json asks for")
def config_with_other_heads(path, rng):
    edit_config(path, num_attention_heads=8)


@kind(MODEL, "gate.weight", "config.json asks for")
def config_with_more_experts(path, rng):
    edit_config(path, num_local_experts=5)


@kind(CONFIG, "num_experts_per_tok")
def config_with_more_choices_than_experts(path, rng):
    edit_config(path, num_experts_per_tok=4)


@kind(MODEL, "lm_head.weight", "tie_word_embeddings")
def config_with_tied_embeddings(path, rng):
    edit_config(path, tie_word_embeddings=True)


@kind(MODEL, "lm_head.weight", "missing")
def untied_without_a_head(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))


@kind(CONFIG, "num_hidden_layers")
def config_with_a_trillion_layers(path, rng):
    edit_config(path, num_hidden_layers=2_000_000_000)


@kind(MODEL, "missing")
def config_with_one_layer_more(path, rng):
    edit_config(path, num_hidden_layers=3)


@kind(MODEL, "not use")
def config_with_one_layer_less(path, rng):
    edit_config(path, num_hidden_layers=1)


# ---- config.json itself


@kind(CONFIG, "cannot be read")
def config_missing(path, rng):
    (path / CONFIG).unlink()


@kind(CONFIG, "not JSON")
def config_not_json(path, rng):
    (path / CONFIG).write_text("vocab_size: 330")


@kind(CONFIG, "expected an object")
def config_not_an_object(path, rng):
    (path / CONFIG).write_text("[1, 2]")


@kind(CONFIG, "hidden_size")
def config_with_absurd_numbers(path, rng):
    edit_config(path, hidden_size=10**30)


@kind(CONFIG, "head_dim is 5")
def config_with_odd_heads(path, rng):
    edit_config(path, head_dim=5)


@kind(CONFIG, "rms_norm_eps is nan; it must be a finite number")
def config_with_nan(path, rng):
    edit_config(path, rms_norm_eps=float("nan"))


@kind(CONFIG, "architectures")
def config_of_another_architecture(path, rng):
    edit_config(path, architectures=["LlamaForCausalLM"])


@kind("config.json", "eos_token_id", "100000")
def eos_beyond_the_vocabulary(path, rng):
    edit_config(path, eos_token_id=100_000)


# ---- tokenizer.json


@kind(TOKENIZER, "not a tokenizer")
def tokenizer_of_no_bytes(path, rng):
    (path / TOKENIZER).write_bytes(b"")


@kind(TOKENIZER, "no token in it")
def tokenizer_without_tokens(path, rng):
    raw = json.loads((path / TOKENIZER).read_text())
    raw["model"].update(vocab={}, merges=[])
    (path / TOKENIZER).write_text(json.dumps(raw | {"added_tokens": []}))


@kind(TOKENIZER, "not a tokenizer")
def tokenizer_cut(path, rng):
    raw = (path / TOKENIZER).read_bytes()
    (path / TOKENIZER).write_bytes(raw[: int(rng.integers(1, len(raw) - 2))])


@kind(TOKENIZER, "vocab_size 330")
def tokenizer_larger_than_the_embedding(path, rng):
    raw = json.loads((path / TOKENIZER).read_text())
    raw["model"]["vocab"] |= {f"<extra {i}>": 320 + i for i in range(11)}
    (path / TOKENIZER).write_text(json.dumps(raw))


@kind(TOKENIZER, "is a directory")
def tokenizer_is_a_directory(path, rng):
    (path / TOKENIZER).unlink()
    (path / TOKENIZER).mkdir()


# ---- the weights


@kind(MODEL, EXPERT, "NaN or Inf")
def nan_in_an_expert(path, rng):
    edit_tensors(path, lambda tensors: np.put(tensors[EXPERT], int(rng.integers(0, 384)), np.nan))


@kind(MODEL, ROUTER, "NaN or Inf")
def infinity_in_a_router(path, rng):
    edit_tensors(path, lambda tensors: np.put(tensors[ROUTER], int(rng.integers(0, 48)), -np.inf))


# ---- claims that only a sparse file can make


def widen_in_a_sparse_file(path, names, rows):
    """Gives the tensors whose name ends so that many rows, all of zeros that take no disk."""
    header, _ = split_file(path)
    at, metadata = 0, header.pop("__metadata__")
    for name, value in header.items():
        if name.endswith(names):
            value["shape"][0] = rows
        end = at + 4 * math.prod(value["shape"])
        value["data_offsets"], at = [at, end], end
    join_file(path, header | {"__metadata__": metadata}, b"")
    os.truncate(path / MODEL, (path / MODEL).stat().st_size + at)


@kind("GB in float32", "host memory are free")
def more_weights_than_memory_in_a_sparse_file(path, rng):
    """Valid in every other respect: 137 GB of zeros that take no disk."""
    widen_in_a_sparse_file(path, ("model.embed_tokens.weight", "lm_head.weight"), 1 << 30)
    edit_config(path, vocab_size=1 << 30)


@kind(CONFIG, "2000000000 experts")
def two_billion_experts_in_a_sparse_file(path, rng):
    widen_in_a_sparse_file(path, "gate.weight", 2_000_000_000)
    edit_config(path, num_local_experts=2_000_000_000)


# ---- the converted form


def in_blocks(path, change):
    """Stores the experts as blocks, changed."""
    tensors = safetensors.numpy.load_file(path / MODEL)
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    blocks = {f"specmoe.expert.{layer}.{expert}": np.zeros((3, 24, 16), np.float32) for layer in range(2) for expert in range(3)}
    change(blocks)
    safetensors.numpy.save_file(kept | blocks, path / MODEL)


@kind(MODEL, "specmoe.expert.1.0", "[3, 24, 16]")
def block_of_another_shape(path, rng):
    in_blocks(path, lambda blocks: blocks.update({"specmoe.expert.1.0": np.zeros((3, 16, 24), np.float32)}))


@kind(MODEL, "missing", EXPERT)
def block_missing(path, rng):
    in_blocks(path, lambda blocks: blocks.pop("specmoe.expert.1.2"))


@kind(MODEL, "not use", "specmoe.expert.2.0")
def block_too_many(path, rng):
    in_blocks(path, lambda blocks: blocks.update({"specmoe.expert.2.0": np.zeros((3, 24, 16), np.float32)}))
