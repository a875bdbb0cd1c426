"""How a checkpoint is quantised: told by its config, by ModelOpt's file, or by its headers; refused by its name and size."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from small_checkpoint_files import RAW_CONFIG, checkpoint_tensors, write_checkpoint
from test_stored_families import ALL

from specmoe_jax.checkpoints import load_config, load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.published.quantisation import from_config, from_headers, read_quantisation, stored_bytes
from specmoe_jax.jobs.job import read_head
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.support.units import GIB

GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}}
FORMS = [  # as the published configs write them
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "FP8 in blocks of 128 x 128", 8.002),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8", 8.0),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "GPTQ INT4 in groups of 128 with desc_act", 4.156),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "GPTQ INT8", 8.0),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        "AWQ INT4 in groups of 128",
        4.156,
    ),
    (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP}},
        "compressed-tensors pack-quantized INT4 in groups of 32",
        4.5,
    ),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4 (NVIDIA ModelOpt)", 4.5),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION (NVIDIA ModelOpt)", None),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes NF4", 4.5),
    ({"quant_method": "mxfp4"}, "MXFP4", 4.25),
    ({"quant_method": "quark"}, "quant_method 'quark'", None),
]


@pytest.mark.parametrize(("raw", "words", "bits"), FORMS, ids=[form[1] for form in FORMS])
def test_every_form_is_named(raw, words, bits):
    found = from_config(RAW_CONFIG | {"quantization_config": raw})
    assert found.words == words and (found.bits is None) == (bits is None)
    assert bits is None or found.bits == pytest.approx(bits, abs=1e-3)


BUILT = ("FP8 in blocks of 128 x 128", "FP8")
OTHERS = [form for form in FORMS if form[1] not in BUILT]  # MXFP4 is built for gpt-oss alone


@pytest.mark.parametrize(("raw", "words", "bits"), OTHERS, ids=[form[1] for form in OTHERS])
def test_every_other_form_is_refused_by_name_wherever_it_is_read(raw, words, bits, tmp_path):
    path = write_checkpoint(tmp_path / "quantised", RAW_CONFIG | {"quantization_config": raw})
    for read in (
        lambda: load_model(str(path)),
        lambda: read_head(path),
        lambda: convert(str(path), tmp_path / "new", to="specmoe"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"config.json: the weights are quantised as {words}" in str(caught.value)
        assert bits is None or "GiB on disk" in str(caught.value)


def test_gpt_oss_in_another_form_than_mxfp4(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ALL["gpt_oss"] | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantised as AWQ"):
        read_head(tmp_path)


def test_a_text_part_may_hold_the_form():
    form = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert from_config({"text_config": {"quantization_config": form}}).words == "FP8 in blocks of 128 x 128"
    assert from_config({"compression_config": {"quant_method": "compressed-tensors", "format": "x"}}).bits is None
    assert from_config(RAW_CONFIG) is None


@pytest.mark.parametrize("value", [3, "fp8", [1]])
def test_an_absurd_form_is_refused(value):
    with pytest.raises(CheckpointError, match="quantization_config is"):
        from_config({"quantization_config": value})


def test_modelopt_tells_in_a_file_of_its_own(tmp_path):
    path = write_checkpoint(tmp_path / "nvfp4")
    told = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    }
    (path / "hf_quant_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json: the weights are quantised as NVFP4"):
        load_model(str(path))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    load_model(str(path))


F8 = np.zeros((8, 8), ml_dtypes.float8_e4m3fn)
HEADERS = [
    ({"a.weight": F8, "a.weight_scale_inv": np.ones((1, 1), np.float32)}, "FP8 in blocks of 128 x 128"),
    ({"a.weight": F8, "a.weight_scale": np.ones(1, np.float32)}, "FP8"),
    ({"a.qweight": np.zeros((1, 8), np.int32), "a.qzeros": np.zeros((1, 1), np.int32), "a.g_idx": np.zeros(8, np.int32)}, "GPTQ"),
    ({"a.qweight": np.zeros((8, 1), np.int32), "a.qzeros": np.zeros((1, 1), np.int32)}, "AWQ"),
    ({"a.weight_packed": np.zeros((8, 1), np.int32), "a.weight_shape": np.zeros(2, np.int64)}, "compressed-tensors"),
    ({"a.weight": np.zeros((8, 4), np.uint8), "a.weight_scale": F8, "a.weight_scale_2": np.ones(1, np.float32)}, "NVFP4"),
    ({"a.x_blocks": np.zeros((8, 4), np.uint8), "a.x_scales": np.zeros(8, np.uint8)}, "MXFP4"),
    ({"a.weight": np.zeros((8, 4), np.int8), "a.SCB": np.ones(8, np.float32)}, "bitsandbytes INT8"),
]


@pytest.mark.parametrize(("tensors", "words"), HEADERS, ids=[words for _, words in HEADERS])
def test_headers_tell_where_no_config_does(tensors, words, tmp_path):
    path = write_checkpoint(tmp_path / "headers", tensors=checkpoint_tensors(parse_config(RAW_CONFIG)) | tensors)
    assert from_headers(open_checkpoint(path)).words == words
    refusal = "2 tensors that this model does not use" if words == BUILT[0] else f"the weights are quantised as {words}"
    with pytest.raises(CheckpointError, match=rf"^model.safetensors: {refusal}"):
        load_model(str(path))


def test_plain_checkpoints_are_none_of_them(tmp_path):
    path = write_checkpoint(tmp_path / "plain")
    assert read_quantisation(path, open_checkpoint(path)) is None


SIZES = [  # published sizes of config.json alone; the shapes of the models
    ("qwen3_30b", {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}, 29.0),
    ("qwen3_30b", None, 56.9),
    (
        "gpt_oss_20b",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
        12.8,
    ),
]
PUBLISHED = {
    "qwen3_30b": ALL["qwen3_moe"]
    | {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "torch_dtype": "bfloat16",
    },
    "gpt_oss_20b": ALL["gpt_oss"]
    | {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "head_dim": 64,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "layer_types": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "form", "gib"), SIZES)
def test_predicted_bytes_on_disk(name, form, gib, tmp_path):
    """Qwen3-30B-A3B-FP8 takes 29 GiB, its bfloat16 form 56.9, gpt-oss-20b 12.8."""
    raw = PUBLISHED[name] | ({"quantization_config": form} if form else {})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_config(tmp_path)
    assert stored_bytes(tmp_path, config, from_config(raw)) / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("pattern", ["re:.*self_attn.*", "model.layers.0.self_attn*", "model.layers.0.self_attn", "self_attn"])
def test_patterns_of_modules_that_are_left_alone(pattern, tmp_path):
    form = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
    (tmp_path / "config.json").write_text(json.dumps(RAW_CONFIG))
    config = load_config(tmp_path)
    all_packed = stored_bytes(tmp_path, config, from_config({"quantization_config": form | {"modules_to_not_convert": []}}))
    layers = 2 if pattern in ("re:.*self_attn.*", "self_attn") else 1
    attention = 16 * 16 * 2 + 16 * 8 * 2  # q, o, k, v of one layer, a byte more each
    assert stored_bytes(tmp_path, config, from_config({"quantization_config": form})) == all_packed + layers * attention


def test_predicted_bytes_are_those_of_plain_files(tmp_path):
    path = write_checkpoint(tmp_path / "plain", RAW_CONFIG | {"dtype": "float32"})
    stored = sum(tensor.nbytes for tensor in safetensors.numpy.load_file(path / "model.safetensors").values())
    assert stored_bytes(path, load_config(path), None) == stored
