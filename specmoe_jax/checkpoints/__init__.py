"""Checkpoints: Hugging Face safetensors -> host weights, checked before they are believed; the tokenizer."""

from specmoe_jax.checkpoints.loader import load_model
from specmoe_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_model"]
