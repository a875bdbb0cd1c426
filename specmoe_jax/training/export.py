"""Writes the trained parameters as a Hugging Face Mixtral checkpoint."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import mixtral
from specmoe_jax.training import model

# </s> ends every training document and so also stands before the next one: it serves as both.
EOS_ID, EOS = 2, "</s>"


def layer_tensors(index: int, layer: model.LayerParams) -> dict[str, jax.Array]:
    """One layer under its Hugging Face names; linear weights are [out, in]."""
    prefix = f"model.layers.{index}."
    tensors = {
        f"{prefix}input_layernorm.weight": layer.attention_norm,
        f"{prefix}post_attention_layernorm.weight": layer.expert_norm,
        f"{prefix}block_sparse_moe.gate.weight": layer.gate.T,
    }
    for name in ("q", "k", "v", "o"):
        tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(layer, f"w{name}").T
    for name, weight in model.merged(layer)._asdict().items():
        for expert, matrix in enumerate(weight):
            tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = matrix.T
    return tensors


def to_tensors(params: model.Params, dtype: str) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, rounded to `dtype`."""
    tensors = {"model.embed_tokens.weight": params.embedding, "model.norm.weight": params.norm, "lm_head.weight": params.head.T}
    for index, layer in enumerate(params.layers):
        tensors |= layer_tensors(index, layer)
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    return {name: np.ascontiguousarray(np.asarray(tensor).astype(target)) for name, tensor in tensors.items()}


def from_tensors(tensors: dict[str, np.ndarray], config: ModelConfig) -> model.Params:
    """The parameters of a checkpoint, float32, without a common part: what is evaluated is what was exported."""

    def matrix(name):
        return np.asarray(tensors[name + ".weight"], np.float32).T

    def layer(index):
        prefix = f"model.layers.{index}."
        experts = {
            w: np.stack([matrix(f"{prefix}block_sparse_moe.experts.{e}.{w}") for e in range(config.num_experts)])
            for w in ("w1", "w3", "w2")
        }
        bases = {f"base{w[1]}": np.zeros_like(stack[0]) for w, stack in experts.items()}
        projections = {f"w{p}": matrix(f"{prefix}self_attn.{p}_proj") for p in ("q", "k", "v", "o")}
        others = {
            "attention_norm": matrix(prefix + "input_layernorm"),
            "expert_norm": matrix(prefix + "post_attention_layernorm"),
            "gate": matrix(prefix + "block_sparse_moe.gate"),
        }
        arrays = others | projections | experts | bases
        return model.LayerParams(**{name: jnp.asarray(array) for name, array in arrays.items()})

    return model.Params(
        embedding=jnp.asarray(matrix("model.embed_tokens").T),
        norm=jnp.asarray(matrix("model.norm")),
        head=jnp.asarray(matrix("lm_head")),
        layers=tuple(layer(i) for i in range(config.num_layers)),
    )


def write_checkpoint(
    folder: pathlib.Path, params: model.Params, config: ModelConfig, *, tokenizer: pathlib.Path, dtype: str
) -> None:
    """config.json, model.safetensors, the tokenizer and the generation defaults into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(to_tensors(params, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    documents = {
        "config.json": mixtral.config_json(config, dtype) | {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID},
        "generation_config.json": {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "unk_token": "<unk>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_positions,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
