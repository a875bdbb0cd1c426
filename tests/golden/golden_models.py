"""The models whose reference logits are kept as golden files: the bundled demo and two random ones of odd sizes."""

import pathlib

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.registry import parse_config

FOLDER = pathlib.Path(__file__).parent
SEED = 11  # of random_model
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "max_position_embeddings": 64, "eos_token_id": 2}
RAW_CONFIGS = {
    # No size divides another; every expert count, head count and width is one that a kernel would have to pad.
    "odd": MIXTRAL
    | {
        "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False,
    },
    # One KV head, one expert per token, tied embeddings, head_dim left to hidden / heads, a window shorter than the prompts.
    "windowed": MIXTRAL
    | {
        "vocab_size": 67, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": 1, "head_dim": None, "num_local_experts": 3, "num_experts_per_tok": 1, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 5, "tie_word_embeddings": True,
    },
}  # fmt: skip
RANDOM_SHAPES = ((1, 1), (1, 9), (3, 17))  # [B, T] of the prompts of random models; the last is compared by module
DEMO_TEXTS = (
    "Call me Ishmael.",
    "In the beginning God created the heaven and the earth, and",
    "The function returns a list of the words in the string, using",
)
DEMO_FULL_POSITIONS = 8  # logits are kept whole for so many positions a text, 16 KiB each; the argmax for all


def golden_file(name: str) -> pathlib.Path:
    return FOLDER / f"{name}.npz"


def odd_config(name: str) -> ModelConfig:
    return parse_config(RAW_CONFIGS[name])


def random_prompts(vocab_size: int) -> list[np.ndarray]:
    """One [B, T] int32 array for each of RANDOM_SHAPES."""
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, vocab_size, shape).astype(np.int32) for shape in RANDOM_SHAPES]
