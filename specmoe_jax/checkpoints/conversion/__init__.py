"""Checkpoints written in other forms: mappable safetensors, Orbax, Hugging Face."""
