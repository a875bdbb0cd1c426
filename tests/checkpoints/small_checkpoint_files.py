"""Writes small valid checkpoints."""

import json

import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import random_tensor, spec_leaves

SEED = 3
RAW_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 330,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
TEXT = ["It was the best of times, it was the worst of times.", "naïve café 😀 — 日本語 text"] * 4


def train_tokenizer(vocab_size: int = 320) -> tokenizers.Tokenizer:
    """A byte-level BPE, so that one character may take several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def checkpoint_tensors(config: ModelConfig, seed: int = SEED) -> dict:
    """Every tensor of a random checkpoint in per-expert names, float32: what random_model(config, seed) holds."""
    family = family_of(config)
    specs = spec_leaves(family.weight_specs(config))
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            specs += family.expert_specs(config, layer, expert)
    return {spec.name: random_tensor(spec, seed) for spec in specs}


def write_checkpoint(path, raw_config=RAW_CONFIG, tensors=None):
    """Writes a directory as transformers would; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw_config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    train_tokenizer().save(str(path / "tokenizer.json"))
    tensors = checkpoint_tensors(parse_config(raw_config)) if tensors is None else tensors
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
