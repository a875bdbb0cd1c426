"""GGUF files of mixtures of experts: their metadata as Hugging Face's files, their tensors as those of a checkpoint."""
