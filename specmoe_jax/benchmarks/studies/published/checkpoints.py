"""Random checkpoints in published forms: real names, widths and vocabularies, with fewer layers and experts; made with torch.

Each form comes with a directory for the reference: the weights that the quantised numbers stand for, under the names that
transformers reads. The forms and the published models that they follow:

qwen3_bf16    Qwen/Qwen3-30B-A3B: 2 layers of 64 experts
qwen3_fp8     Qwen/Qwen3-30B-A3B-FP8: the same in blocks of 128 x 128, `weight_scale_inv`
gptoss_mxfp4  openai/gpt-oss-20b: 2 layers of 16 experts, `*_blocks` and `*_scales`
nllb_bin      facebook/nllb-moe-54b: half its width, 2 + 2 layers of 16 experts, `pytorch_model-*.bin` without the prefix
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 2,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 2, "num_key_value_heads": 8,
    "num_local_experts": 16, "pad_token_id": 199999, "rms_norm_eps": 1e-5,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 201088,
}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                           "model.embed_tokens", "lm_head"]}  # fmt: skip
NLLB = {
    "architectures": ["NllbMoeModel"], "model_type": "nllb-moe", "activation_function": "relu", "bos_token_id": 0,
    "d_model": 1024, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096, "decoder_layers": 2, "decoder_sparse_step": 2,
    "decoder_start_token_id": 2, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_layers": 2,
    "encoder_sparse_step": 2, "eos_token_id": 2, "expert_capacity": 64, "max_position_embeddings": 1024,
    "moe_eval_capacity_token_fraction": 1.0, "moe_token_dropout": 0.0, "normalize_router_prob_before_dropping": False,
    "num_experts": 16, "pad_token_id": 1, "router_bias": False, "router_dtype": "float32", "scale_embedding": True,
    "second_expert_policy": "all", "torch_dtype": "float32", "vocab_size": 256206, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
# The sixteen values of a 4-bit code (OCP MX, E2M1), in the order of the codes.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Shard = dict[str, torch.Tensor]


class Made(NamedTuple):
    """A shard as it is published, and what its tensors stand for, under the reference's names."""

    published: Shard
    meant: Shard


def draws(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [out, in], multiples of 128 -> e4m3 codes, scales [out / 128, in / 128] and the float32 weights they stand for."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // 128, 128, columns // 128, 128)
    scales = blocks.abs().amax(dim=(1, 3)) / 448.0
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (codes.float() * scales[:, None, :, None]).reshape(rows, columns)
    return codes.reshape(rows, columns), scales, meant


def mxfp4_meant(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes [E, rows, groups, 16] uint8, scales [E, rows, groups] uint8 -> [E, groups * 32, rows] bfloat16."""
    table = torch.tensor(E2M1)
    values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1).reshape(*codes.shape[:3], 32)
    meant = torch.ldexp(values, scales.int()[..., None] - 127).reshape(*codes.shape[:2], -1)
    return meant.to(torch.bfloat16).transpose(1, 2).contiguous()


def qwen3(config: dict[str, Any], fp8: bool = False, embedding_scale: float = 1.0) -> Iterator[Made]:
    """A shard a layer, then embedding, head and last norm. embedding_scale: of the embedding beside all other matrices."""
    normal, c = draws(0), config
    hidden, queries, keys = c["hidden_size"], c["num_attention_heads"] * 128, c["num_key_value_heads"] * 128
    width = c["moe_intermediate_size"]
    ones = torch.ones
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        matrices = {
            "self_attn.q_proj": normal(queries, hidden),
            "self_attn.k_proj": normal(keys, hidden),
            "self_attn.v_proj": normal(keys, hidden),
            "self_attn.o_proj": normal(hidden, queries),
        }
        for expert in range(c["num_experts"]):
            for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
                matrices[f"mlp.experts.{expert}.{name}"] = normal(*shape)
        plain = {
            "input_layernorm": ones(hidden),
            "post_attention_layernorm": ones(hidden),
            "self_attn.q_norm": ones(128),
            "self_attn.k_norm": ones(128),
            "mlp.gate": normal(c["num_experts"], hidden),
        }
        published = {f"{prefix}{name}.weight": tensor.to(torch.bfloat16) for name, tensor in plain.items()}
        meant = dict(published)
        for name, weight in matrices.items():
            if fp8:
                codes, scales, exact = fp8_blocks(weight)
                published |= {f"{prefix}{name}.weight": codes, f"{prefix}{name}.weight_scale_inv": scales}
                meant[f"{prefix}{name}.weight"] = exact
            else:
                published[f"{prefix}{name}.weight"] = meant[f"{prefix}{name}.weight"] = weight
        yield Made(published, meant)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        scale = embedding_scale if "embed" in name else 1.0
        shard = {name: normal(c["vocab_size"], hidden) * scale}
        yield Made(shard, shard)
    shard = {"model.norm.weight": ones(hidden, dtype=torch.bfloat16)}
    yield Made(shard, shard)


def gpt_oss() -> Iterator[Made]:
    normal, c = draws(1), GPT_OSS
    generator = torch.Generator().manual_seed(2)
    hidden, experts, heads, kv_heads = c["hidden_size"], c["num_local_experts"], c["num_attention_heads"], c["num_key_value_heads"]
    ones = lambda n: torch.ones(n, dtype=torch.bfloat16)  # noqa: E731

    def packed(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (experts, rows, hidden // 32, 16), dtype=torch.uint8, generator=generator)
        # Exponents of about 0.02 over the mean magnitude of a code.
        return codes, torch.randint(118, 121, codes.shape[:3], dtype=torch.uint8, generator=generator)

    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        both = {
            "input_layernorm.weight": ones(hidden),
            "post_attention_layernorm.weight": ones(hidden),
            "self_attn.sinks": normal(heads),
            "mlp.router.weight": normal(experts, hidden),
            "mlp.router.bias": normal(experts),
            "mlp.experts.gate_up_proj_bias": normal(experts, 2 * hidden),
            "mlp.experts.down_proj_bias": normal(experts, hidden),
        }
        for name, width, inputs in (
            ("q", heads * 64, hidden),
            ("k", kv_heads * 64, hidden),
            ("v", kv_heads * 64, hidden),
            ("o", hidden, heads * 64),
        ):
            both |= {f"self_attn.{name}_proj.weight": normal(width, inputs), f"self_attn.{name}_proj.bias": normal(width)}
        shared = {prefix + name: tensor for name, tensor in both.items()}
        published, meant = dict(shared), dict(shared)
        for name, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            codes, scales = packed(rows)
            published |= {f"{prefix}mlp.experts.{name}_blocks": codes, f"{prefix}mlp.experts.{name}_scales": scales}
            meant[f"{prefix}mlp.experts.{name}"] = mxfp4_meant(codes, scales)
        yield Made(published, meant)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shard = {name: normal(c["vocab_size"], hidden)}
        yield Made(shard, shard)
    shard = {"model.norm.weight": ones(hidden)}
    yield Made(shard, shard)


def write_shards(made: Iterator[Made], published: pathlib.Path, reference: pathlib.Path | None = None) -> None:
    """Directories of shards with their indexes; one shard is in memory at a time."""
    folders = [folder for folder in (published, reference) if folder is not None]
    indexes: dict[pathlib.Path, dict[str, str]] = {folder: {} for folder in folders}
    for number, pair in enumerate(made):
        for folder, shard in zip(folders, pair, strict=False):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            indexes[folder] |= dict.fromkeys(shard, file)
    for folder, names in indexes.items():
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def write_nllb(published: pathlib.Path, reference: pathlib.Path) -> None:
    """transformers makes the model; its pickled shards carry the names of the base class, as the published ones do."""
    import transformers

    torch.manual_seed(3)
    config = transformers.NllbMoeConfig(
        **{k: v for k, v in NLLB.items() if k not in ("architectures", "model_type", "torch_dtype")}
    )
    model = transformers.NllbMoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # The head is the embedding, so with the usual start every token would be answered by itself.
            if weight.ndim == 2 and not any(part in name for part in ("shared", "embed", "router", "lm_head")):
                weight *= 6.0
    model.save_pretrained(reference)
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    names, half, index = sorted(state), len(state) // 2, {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, published / file)
        index |= dict.fromkeys(part, file)
    (published / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


class Form(NamedTuple):
    """config: of the published directory; quantization: what it adds to the reference's; tokenizer: a folder's name or None."""

    config: dict[str, Any]
    quantization: dict[str, Any] | None
    tokenizer: str | None
    write: Callable[[pathlib.Path, pathlib.Path], None]


FORMS = {
    "qwen3_bf16": Form(QWEN3, None, "qwen3", lambda *folders: write_shards(qwen3(QWEN3), *folders)),
    "qwen3_fp8": Form(QWEN3, FP8, "qwen3", lambda *folders: write_shards(qwen3(QWEN3, fp8=True), *folders)),
    "gptoss_mxfp4": Form(GPT_OSS, MXFP4, "gptoss", lambda *folders: write_shards(gpt_oss(), *folders)),
    "nllb_bin": Form(NLLB, None, None, write_nllb),
}


def write_form(name: str, folder: pathlib.Path, tokenizers: pathlib.Path | None) -> None:
    """folder/published and folder/reference. tokenizers: a folder with one subfolder of tokenizer files a family."""
    form = FORMS[name]
    published, reference = folder / "published", folder / "reference"
    for path in (published, reference):
        path.mkdir(parents=True)
    form.write(published, reference)
    quantization = {} if form.quantization is None else {"quantization_config": form.quantization}
    (published / "config.json").write_text(json.dumps(form.config | quantization))
    if not (reference / "config.json").exists():
        (reference / "config.json").write_text(json.dumps(form.config))
    if tokenizers is not None and form.tokenizer is not None:
        for file in (tokenizers / form.tokenizer).iterdir():
            for path in (published, reference):
                shutil.copy(file, path)
