"""llama.cpp's names of tensors -> Hugging Face's, and what its converter did beside: rows in another order, a tensor cut in two."""

from typing import Any

from specmoe_jax.checkpoints.gguf.metadata import GgufFile, GgufTensor
from specmoe_jax.models.published.naming import STACKED

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}
_EXPERTS = {f"ffn_{kind}_exps": name for kind, name in STACKED.items()} | {"ffn_gate_up_exps": "mlp.experts.gate_up_proj"}


def _shared(module: str) -> dict[str, str]:
    return {f"ffn_{kind}_shexp": f"mlp.{module}.{kind}_proj" for kind in ("gate", "up", "down")}


ARCHITECTURES = {  # modules of a layer, beside those of all
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "qwen2moe": _shared("shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    "qwen3moe": _QK_NORMS,
    "deepseek2": _shared("shared_experts") | _LATENT,
    "gpt-oss": {
        "ffn_gate_inp": "mlp.router",
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
    },
}
_BARE = (  # no .weight follows
    "self_attn.sinks",
    "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate_up_proj",
    *STACKED.values(),
)
_KEY, _VALUE = "attn_k_b.weight", "attn_v_b.weight"  # newer files of latent attention cut its second projection in two


def rows(file: GgufFile) -> list[dict[str, Any]]:
    """The tensors in Hugging Face's terms; a name that has none there stays as it is, and is refused when it is not used."""
    heads = {
        "q_proj": file.get("attention.head_count"),
        "k_proj": file.get("attention.head_count_kv", file.get("attention.head_count")),
    }
    table = []
    for tensor in file.tensors.values():
        if tensor.name.endswith(_VALUE) and (tensor.name.removesuffix(_VALUE) + _KEY) in file.tensors:
            continue  # stands beside the other half
        name = hugging_face_name(file.architecture, tensor.name)
        row = _row(tensor, name, _shape(name, tensor.shape))
        if file.architecture == "llama" and (module := _projection(name)) in heads:
            row["heads"] = heads[module]
        value = file.tensors.get(tensor.name.removesuffix(_KEY) + _VALUE) if tensor.name.endswith(_KEY) else None
        table.append(row if value is None else _joined(row, tensor, value))
    return table


def hugging_face_name(architecture: str, name: str) -> str:
    """Of a tensor; what has no such name keeps its own."""
    parts = name.split(".")
    if len(parts) < 4 or parts[0] != "blk":
        return _OUTER.get(name, name)
    modules = _MODULES | ARCHITECTURES.get(architecture, {}) | _EXPERTS
    if len(parts) == 5 and parts[3].isdigit() and architecture == "llama":  # before experts were stacked
        matrix = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}.get(parts[2])
        return name if matrix is None else f"model.layers.{parts[1]}.block_sparse_moe.experts.{parts[3]}.{matrix}.{parts[4]}"
    if len(parts) != 4 or parts[2] not in modules:
        return name
    module, kind = modules[parts[2]], parts[3]
    if module in _BARE:
        bias = kind == "bias" and module.startswith("mlp.experts.")
        return f"model.layers.{parts[1]}.{module}{'_bias' if bias else ''}"
    return f"model.layers.{parts[1]}.{module}.{kind}"


def _row(tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": name, "file": str(tensor.path), "dtype": tensor.type, "shape": shape, "start": tensor.start, "end": tensor.end,
    }  # fmt: skip


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As Hugging Face has it, which keeps the one row of a shared expert's gate as a matrix, and has no axis of one elsewhere."""
    return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape


def _projection(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2] if name.count(".") > 1 else ""


def _joined(row: dict[str, Any], key: GgufTensor, value: GgufTensor) -> dict[str, Any]:
    """kv_b_proj of two tensors: keys [H, rank, nope] (transposed) and values [H, value, rank]."""
    heads, rank, nope = key.shape
    name = key.name.removesuffix(_KEY)
    joined = f"model.layers.{name.split('.')[1]}.self_attn.kv_b_proj.weight"
    return row | {
        "name": joined,
        "shape": (heads * (nope + value.shape[1]), rank),
        "halves": [_row(key, key.name, key.shape), _row(value, value.name, value.shape)],
    }
