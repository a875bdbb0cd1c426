"""A named tiny model with a tokenizer, so that every test and every doubt can say `tiny()`. Random weights, odd sizes."""

import functools
import json
import pathlib

import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.families.registry import family_of
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.models.spec import random_tensor, spec_leaves

EOS_ID = 256

TINY = ModelConfig(
    family="mixtral",
    vocab_size=263,  # 256 bytes, an end-of-sequence token, and ids that no tokenizer knows
    hidden_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    expert_hidden=24,
    num_experts=5,
    experts_per_token=2,
    max_positions=90,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie_embeddings=False,
    sliding_window=None,
    eos_token_ids=(EOS_ID,),
)


@functools.cache
def tiny(dtype: str = "float32") -> Model:
    """The same model for the same dtype; made once a process."""
    return random_model(TINY, seed=0, dtype=dtype, tokenizer=byte_tokenizer())


TINY_JSON = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": TINY.vocab_size,
    "hidden_size": TINY.hidden_size,
    "intermediate_size": TINY.expert_hidden,
    "num_hidden_layers": TINY.num_layers,
    "num_attention_heads": TINY.num_heads,
    "num_key_value_heads": TINY.num_kv_heads,
    "head_dim": TINY.head_dim,
    "num_local_experts": TINY.num_experts,
    "num_experts_per_tok": TINY.experts_per_token,
    "max_position_embeddings": TINY.max_positions,
    "rope_theta": TINY.rope_theta,
    "rms_norm_eps": TINY.norm_eps,
    "eos_token_id": list(TINY.eos_token_ids),
}


def write_tiny(folder: pathlib.Path) -> None:
    """The weights of `tiny()` in Hugging Face format, float32, without a tokenizer."""
    family = family_of(TINY)
    specs = spec_leaves(family.weight_specs(TINY))
    for layer in range(TINY.num_layers):
        for expert in range(TINY.num_experts):
            specs += spec_leaves(family.expert_specs(TINY, layer, expert))
    safetensors.numpy.save_file({spec.name: random_tensor(spec, seed=0) for spec in specs}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_JSON))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, in the order of their code units, and "</s>"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend=backend, eos_token_ids=(EOS_ID,))


EAGLE_JSON = {
    "hidden_size": TINY.hidden_size,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-6,
    "vocab_size": TINY.vocab_size,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
}
EAGLE3_JSON = EAGLE_JSON | {"draft_vocab_size": 131, "eagle_config": {eagle_config.AUX_LAYERS_KEY: [0, 1, 2]}}


def eagle_head(model: Model, *, fused: bool = False) -> eagle.EagleHead:
    """A random EAGLE-1 head for `tiny()`, or an EAGLE-3 one."""
    raw = EAGLE3_JSON if fused else EAGLE_JSON
    return eagle.random_head(eagle_config.parse_config(raw, model.config, fused=fused), model)
