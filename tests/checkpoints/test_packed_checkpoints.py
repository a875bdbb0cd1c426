"""Quantised checkpoints as they are published: experts stay packed, decode to the last bit, and run as the decoded model does."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from family_files import stored_tensors, write
from quantised_files import awq, compressed, fp8, fp8_rows, gptq, mxfp4_gpt_oss, nvfp4, quantise_all, quantised, write_pair
from test_mtp import layer_tensors

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.mtp import load_mtp
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing import packed_bytes, unpack, unpacked
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": WEIGHTS}}}
FP8_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}}},
}
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "mlp_only_layers": [1],
    "decoder_sparse_step": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
RAW = RAW_CONFIGS | {"groups": RAW_CONFIGS["qwen3_moe"] | SIZES}


def of_groups(quantise):
    return quantised("qwen3_moe", quantise, RAW["groups"])


FORMS = {
    "fp8": ("qwen3_moe", FP8 | {"weight_block_size": [128, 128]}, lambda: quantised("qwen3_moe", fp8((128, 128)))),
    "fp8 in bfloat16 scales": (
        "deepseek_v3",
        FP8 | {"weight_block_size": [16, 8]},
        lambda: quantised("deepseek_v3", fp8((16, 8), ml_dtypes.bfloat16)),
    ),
    "fp8 of a hybrid": (
        "qwen3_5_moe",
        FP8 | {"weight_block_size": [16, 8]},
        lambda: quantised("qwen3_5_moe", fp8((16, 8), ml_dtypes.bfloat16)),
    ),
    "fp8 with a scale per output": ("groups", FP8_CHANNELS, lambda: of_groups(fp8_rows(per_row=True))),
    "fp8 with a scale per matrix": (
        "groups",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda: of_groups(fp8_rows(per_row=False)),
    ),
    "awq": ("groups", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, lambda: of_groups(awq(32))),
    "gptq": ("groups", GPTQ, lambda: of_groups(gptq(32))),
    "gptq in its second version": (
        "groups",
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda: of_groups(gptq(32, less=0)),
    ),
    "compressed-tensors": ("groups", COMPRESSED, lambda: of_groups(compressed(32, zeros=False))),
    "compressed-tensors with zeros": (
        "groups",
        COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS | {"symmetric": False}}}},
        lambda: of_groups(compressed(32, zeros=True)),
    ),
    "nvfp4": ("groups", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda: of_groups(nvfp4)),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, lambda: mxfp4_gpt_oss(RAW_CONFIGS["gpt_oss"])),
}
TOKENS = [[5, 99, 3, 17, 64, 8, 2]]


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    family, form, tensors = FORMS[request.param]
    return write_pair(tmp_path, RAW[family], form, tensors())


def blocks_of(model) -> list[np.ndarray]:
    return [np.asarray(model.experts[layer][e]) for layer in range(len(model.experts)) for e in range(model.config.num_experts)]


def test_experts_stay_packed_and_decode_to_the_last_bit(pair):
    packed, exact = (load_model(str(path)) for path in pair)
    experts = packed.config.experts
    assert experts.packing is not None and exact.config.experts.packing is None
    jax.tree.map(np.testing.assert_array_equal, packed.weights, exact.weights)
    for block, wanted in zip(blocks_of(packed), blocks_of(exact), strict=True):
        assert block.dtype == np.uint8
        np.testing.assert_array_equal(unpacked(experts, block), wanted)
        np.testing.assert_array_equal(unpack(experts, jnp.asarray(block)), wanted)


def test_memory_is_what_the_disk_holds(pair):
    packed, stored = load_model(str(pair[0])), open_checkpoint(pair[0])
    kept = {name: t.entry for name, t in stored.tensors.items() if ".experts." in name}
    unused = (".g_idx", ".weight_shape", ".input_scale")
    on_disk = sum(entry.bytes for name, entry in kept.items() if not name.endswith(unused))
    # What is kept in float32 whatever it is stored in; zeros of one group take a whole byte.
    scales_of_groups = packed.config.experts.packing.startswith("compressed")
    widened = sum(e.bytes for e in kept.values() if e.dtype == "BF16" and not scales_of_groups)
    zeros = sum(e.bytes for n, e in kept.items() if n.endswith(("zeros", "zero_point")))
    in_memory = sum(block.nbytes for block in blocks_of(packed))
    assert in_memory == packed.expert_bytes * len(blocks_of(packed))
    assert on_disk + widened <= in_memory <= on_disk + widened + zeros


@pytest.mark.parametrize(
    ("packing", "expert", "stored"),
    [
        ("fp8:128x128", {"hidden": 2048, "model": 7168}, 3 * 2048 * 7168 * (1 + 4 / 128**2)),  # DeepSeek-V3
        ("fp8:128x128", {"hidden": 768, "model": 2048}, 3 * 768 * 2048 * (1 + 2 / 128**2)),  # Qwen3-30B-A3B
        ("awq:128", {"hidden": 768, "model": 2048}, 3 * 768 * 2048 * (4 + 20 / 128) / 8),  # Qwen3-30B-A3B-AWQ
        ("gptq:128", {"hidden": 768, "model": 2048}, 3 * 768 * 2048 * (4 + 20 / 128) / 8),
        ("compressed:32:bfloat16", {"hidden": 2048, "model": 7168}, 3 * 2048 * 7168 * (4 + 16 / 32) / 8),  # Kimi-K2-Thinking
        ("nvfp4", {"hidden": 2048, "model": 7168}, 3 * 2048 * 7168 * 4.5 / 8),  # DeepSeek-V3
        ("mxfp4", {"hidden": 2880, "model": 2880, "biased": True}, 3 * 2880 * 2880 * 17 / 32 + 2 * 3 * 2880),  # gpt-oss
    ],
)
def test_published_sizes(packing, expert, stored):
    assert packed_bytes(ExpertConfig(**expert, packing=packing)) == pytest.approx(stored, rel=0.002)


def test_logits(pair):
    packed, exact = (load_model(str(path)).logits(TOKENS) for path in pair)
    assert jnp.abs(packed - exact).max() <= 1e-5 * jnp.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_when_asked_for(pair, dtype):
    packed = load_model(str(pair[0]), dtype=dtype, expert_dtype="decoded")
    exact = load_model(str(pair[1]), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, packed.experts, exact.experts)
    assert packed.config == exact.config


def test_a_plain_checkpoint_has_nothing_to_decode(pair):
    with pytest.raises(RequestError, match="expert_dtype=decoded has no effect"):
        load_model(str(pair[1]), expert_dtype="decoded")


def test_converted_experts_are_mapped_as_they_are(pair, tmp_path):
    packed = load_model(str(pair[0]))
    mapped = load_model(str(convert(str(pair[0]), tmp_path / "mapped", to="specmoe")))
    assert mapped.config == packed.config
    jax.tree.map(np.testing.assert_array_equal, mapped.experts, packed.experts)
    plain = load_model(str(convert(str(tmp_path / "mapped"), tmp_path / "plain", to="huggingface")))
    jax.tree.map(np.testing.assert_array_equal, plain.experts, load_model(str(pair[1])).experts)


def test_from_disk(pair):
    packed, files = load_model(str(pair[0])), load_model(str(pair[0]), expert_tier="disk").experts
    assert isinstance(files, DiskExperts)
    assert files.block_shapes[0] == packed.experts[0][0].shape and files.block_dtype == np.uint8
    np.testing.assert_array_equal(files.read(1, 2), packed.experts[1][2])


def test_a_code_that_is_no_number_is_refused(tmp_path):
    family, form, tensors = FORMS["fp8"]
    packed, exact = tensors()
    name = next(name for name in packed if ".experts." in name)
    packed[name][0, 0] = np.nan
    path, _ = write_pair(tmp_path, RAW[family], form, (packed, exact))
    with pytest.raises(CheckpointError, match=f"{name}: decodes to NaN or Inf"):
        load_model(str(path))
    load_model(str(path), check_finite=False)


def test_inputs_out_of_order_are_refused(tmp_path):
    packed, exact = of_groups(gptq(32))
    name = next(name for name in packed if name.endswith("g_idx") and ".experts." in name)
    packed[name] = packed[name][::-1].copy()
    path, _ = write_pair(tmp_path, RAW["groups"], GPTQ, (packed, exact))
    with pytest.raises(CheckpointError, match=r"g_idx\W+inputs are out of order \(act-order, desc_act\)"):
        load_model(str(path))


def test_a_form_without_a_config_is_told_by_its_headers(tmp_path):
    packed, _ = of_groups(nvfp4)
    path = write(tmp_path / "packed", RAW["groups"], packed)
    assert load_model(str(path)).config.experts.packing == "nvfp4"


@pytest.mark.parametrize("left_plain", [False, True])
def test_the_layer_for_further_tokens(left_plain, tmp_path):
    """It may be among the modules that were left as they are (NVIDIA's DeepSeek-V3); it is decoded when it is loaded."""
    model, raw = tiny_family("deepseek_v3"), RAW_CONFIGS["deepseek_v3"]
    own = f"model.layers.{model.config.num_layers}."
    packed, exact = quantise_all(stored_tensors(model, 0) | layer_tensors(model), fp8((16, 8)))
    if left_plain:
        packed = {n: t for n, t in packed.items() if not n.startswith(own)} | {n: t for n, t in exact.items() if n.startswith(own)}
    path, _ = write_pair(tmp_path, raw, FP8 | {"weight_block_size": [16, 8]}, (packed, exact))
    for folder in (path, convert(str(path), tmp_path / "mapped", to="specmoe")):
        head = load_mtp(load_model(str(folder)))
        assert head.config.own_experts.packing is None
        np.testing.assert_array_equal(head.experts[0][0], exact[f"{own}mlp.experts.0.gate_proj.weight"])
        np.testing.assert_array_equal(head.weights.layer.o, exact[f"{own}self_attn.o_proj.weight"])
