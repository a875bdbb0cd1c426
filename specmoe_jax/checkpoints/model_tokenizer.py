"""The tokenizer of a checkpoint directory, and what it says of the model's end tokens."""

import dataclasses
import os
import pathlib

from specmoe_jax.checkpoints.published.tiktoken_files import tiktoken_file
from specmoe_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.support.errors import CheckpointError


def load_model_tokenizer(path: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a directory, None when it has none. Raises CheckpointError when it is broken or too large."""
    file = path / "tokenizer.json" if os.path.lexists(path / "tokenizer.json") else tiktoken_file(path)
    if file is None:
        return None
    tokenizer = load_tokenizer(path, config.eos_token_ids)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{file.name}: ids up to {tokenizer.vocab_size - 1}, but config.json says vocab_size {config.vocab_size}:"
            " this tokenizer is of another model"
        )
    return tokenizer


def with_end_tokens(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config with the end-of-sequence token that only the tokenizer's own config names."""
    return config if tokenizer is None else dataclasses.replace(config, eos_token_ids=tokenizer.eos_token_ids)
