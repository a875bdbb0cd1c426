"""Checkpoints: Hugging Face safetensors -> host weights, checked before they are believed; the tokenizer."""

from specmoe_jax.checkpoints.eagle import load_head
from specmoe_jax.checkpoints.loader import checkpoint_path, load_config, load_model
from specmoe_jax.checkpoints.manifest import checkpoint_hash, write_manifest
from specmoe_jax.checkpoints.mtp import load_mtp
from specmoe_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "checkpoint_hash",
    "checkpoint_path",
    "load_config",
    "load_head",
    "load_model",
    "load_mtp",
    "write_manifest",
]
