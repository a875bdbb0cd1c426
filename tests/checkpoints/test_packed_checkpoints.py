"""Quantised checkpoints as they are published: experts stay packed, decode to the last bit, and run as the decoded model does."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantised_files import fp8, mxfp4_gpt_oss, quantised, write_pair

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.models.packing import packed_bytes, unpack, unpacked
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.testing.families import RAW_CONFIGS

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FORMS = {
    "fp8": ("qwen3_moe", FP8 | {"weight_block_size": [128, 128]}, lambda: quantised("qwen3_moe", fp8((128, 128)))),
    "fp8 in bfloat16 scales": (
        "deepseek_v3",
        FP8 | {"weight_block_size": [16, 8]},
        lambda: quantised("deepseek_v3", fp8((16, 8), ml_dtypes.bfloat16)),
    ),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, lambda: mxfp4_gpt_oss(RAW_CONFIGS["gpt_oss"])),
}
TOKENS = [[5, 99, 3, 17, 64, 8, 2]]


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    family, form, tensors = FORMS[request.param]
    return write_pair(tmp_path, RAW_CONFIGS[family], form, tensors())


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
    widened = [entry for entry in kept.values() if entry.dtype == "BF16"]  # scales of FP8, biases: kept in float32
    in_memory = sum(block.nbytes for block in blocks_of(packed))
    assert in_memory == packed.expert_bytes * len(blocks_of(packed))
    assert in_memory == sum(entry.bytes for entry in kept.values()) + sum(entry.bytes for entry in widened)


@pytest.mark.parametrize(
    ("packing", "expert", "stored"),
    [
        ("fp8:128x128", {"hidden": 2048, "model": 7168}, 3 * 2048 * 7168 * (1 + 4 / 128**2)),  # DeepSeek-V3
        ("fp8:128x128", {"hidden": 768, "model": 2048}, 3 * 768 * 2048 * (1 + 2 / 128**2)),  # Qwen3-30B-A3B
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
    path, _ = write_pair(tmp_path, RAW_CONFIGS[family], form, (packed, exact))
    with pytest.raises(CheckpointError, match=f"{name}: decodes to NaN or Inf"):
        load_model(str(path))
    load_model(str(path), check_finite=False)
