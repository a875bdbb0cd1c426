"""The trained parameters as a Hugging Face glm4_moe directory, MTP layer included, and back.

The MTP layer lies behind the last layer under the names of the published GLM-4.5 checkpoints. Its copies of the embedding and the
output matrix are left out: they are the model's own.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from specmoe_jax.training.witness import model
from specmoe_jax.training.witness.config import WitnessConfig

# </s> ends every training document and so also stands before the next one: it serves as both.
EOS_ID, EOS = 2, "</s>"
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MTP = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj", "norm": "shared_head.norm"}
_MLP = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}


def _named(weights, names: dict[str, str], prefix: str) -> dict[str, np.ndarray]:
    """Fields under their published names; matrices are [out, in] there."""
    return {f"{prefix}{name}.weight": np.asarray(getattr(weights, field)).T for field, name in names.items()}


def layer_tensors(prefix: str, layer: model.Layer, bias: jax.Array) -> dict[str, np.ndarray]:
    tensors = _named(layer, _NORMS, prefix) | _named(layer.attention, _ATTENTION, prefix + "self_attn.")
    if isinstance(layer.ffn, model.Mlp):
        return tensors | _named(layer.ffn, _MLP, prefix + "mlp.")
    tensors[prefix + "mlp.gate.weight"] = np.asarray(layer.ffn.router).T
    tensors[prefix + "mlp.gate.e_score_correction_bias"] = np.asarray(bias)
    for index in range(layer.ffn.routed.w_gate.shape[0]):
        expert = model.Mlp._make(np.asarray(w[index]) for w in layer.ffn.routed)
        tensors |= _named(expert, _MLP, f"{prefix}mlp.experts.{index}.")
    return tensors | _named(layer.ffn.shared, _MLP, prefix + "mlp.shared_experts.")


def to_tensors(params: model.Params, bias: jax.Array, dtype: str) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, rounded to `dtype`; the routers' biases stay float32, as published."""
    tensors = {"model.embed_tokens.weight": params.embedding, "model.norm.weight": params.norm, "lm_head.weight": params.head.T}
    for index, layer in enumerate(params.layers):
        tensors |= layer_tensors(f"model.layers.{index}.", layer, bias[max(index - 1, 0)])
    prefix = f"model.layers.{len(params.layers)}."
    tensors |= _named(params.mtp, _MTP, prefix) | layer_tensors(prefix, params.mtp.layer, bias[-1])
    target = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    return {
        name: np.ascontiguousarray(np.asarray(t).astype(np.float32 if "correction_bias" in name else target))
        for name, t in tensors.items()
    }


def from_tensors(tensors: dict[str, np.ndarray], config: WitnessConfig) -> tuple[model.Params, jax.Array]:
    """The float32 parameters and biases of a checkpoint: what is evaluated is what was exported."""

    def read(kind, names, prefix):
        return kind(**{field: _array(tensors[f"{prefix}{name}.weight"]) for field, name in names.items()})

    def layer(index):
        prefix = f"model.layers.{index}."
        if index == 0:
            ffn = read(model.Mlp, _MLP, prefix + "mlp.")
        else:
            experts = [read(model.Mlp, _MLP, f"{prefix}mlp.experts.{e}.") for e in range(config.num_experts)]
            shared = read(model.Mlp, _MLP, prefix + "mlp.shared_experts.")
            stacked = jax.tree.map(lambda *ws: jnp.stack(ws), *experts)
            ffn = model.Experts(router=_array(tensors[prefix + "mlp.gate.weight"]), routed=stacked, shared=shared)
        norms = {field: _array(tensors[f"{prefix}{name}.weight"]) for field, name in _NORMS.items()}
        return model.Layer(**norms, attention=read(model.Attention, _ATTENTION, prefix + "self_attn."), ffn=ffn)

    last = f"model.layers.{config.num_layers}."
    mtp = {field: _array(tensors[f"{last}{name}.weight"]) for field, name in _MTP.items()}
    params = model.Params(
        embedding=jnp.asarray(np.asarray(tensors["model.embed_tokens.weight"], np.float32)),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        norm=_array(tensors["model.norm.weight"]),
        head=_array(tensors["lm_head.weight"]),
        mtp=model.Mtp(layer=layer(config.num_layers), **mtp),
    )
    biases = [tensors[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] for i in range(1, config.num_layers + 1)]
    return params, jnp.asarray(np.stack(biases))


def _array(tensor: np.ndarray) -> jax.Array:
    return jnp.asarray(np.asarray(tensor, np.float32).T)


def config_json(config: WitnessConfig, dtype: str) -> dict:
    """The keys of GLM-4.5-Air's config.json; use_qk_norm as in GLM-4.5."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "partial_rotary_factor": config.rotary_share,
        "initializer_range": model.INIT_STD,
        "intermediate_size": config.dense_hidden,
        "max_position_embeddings": config.max_positions,
        "moe_intermediate_size": config.expert_hidden,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_heads,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": 1,
        "routed_scaling_factor": config.routed_scale,
        "num_experts_per_tok": config.experts_per_token,
        "first_k_dense_replace": 1,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": config.vocab_size,
    }


def read_config(folder: pathlib.Path) -> WitnessConfig:
    """The sizes in a config.json that `config_json` wrote."""
    keys = json.loads((folder / "config.json").read_text())
    names = {
        "rotary_share": "partial_rotary_factor",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "num_experts": "n_routed_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_hidden": "moe_intermediate_size",
        "dense_hidden": "intermediate_size",
        "routed_scale": "routed_scaling_factor",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    }
    return WitnessConfig(**{f.name: keys[names.get(f.name, f.name)] for f in dataclasses.fields(WitnessConfig)})


def write_checkpoint(
    folder: pathlib.Path, params: model.Params, bias: jax.Array, config: WitnessConfig, *, tokenizer: pathlib.Path, dtype: str
) -> None:
    """config.json, model.safetensors, the tokenizer and the generation defaults into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(to_tensors(params, bias, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    documents = {
        "config.json": config_json(config, dtype),
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


def read_checkpoint(folder: pathlib.Path, config: WitnessConfig) -> tuple[model.Params, jax.Array]:
    return from_tensors(safetensors.numpy.load_file(folder / "model.safetensors"), config)
