"""A load gives what the checkpoint holds, bit for bit, whatever names and types it is stored in."""

import json
import os
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from small_checkpoint_files import RAW_CONFIG, SEED, checkpoint_tensors, write_checkpoint

from specmoe_jax.checkpoints import checkpoint_hash, load_config, load_model, memory, write_manifest
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import PINNED_LIMIT, random_model
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.testing.oracles import expert_block

CONFIG = parse_config(RAW_CONFIG)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"


def assert_same(model, other):
    """Every weight and every expert equal in bits."""
    jax.tree.map(np.testing.assert_array_equal, model.weights, other.weights)
    for blocks, other_blocks in zip(model.experts, other.experts, strict=True):
        for block, other_block in zip(blocks, other_blocks, strict=True):
            assert block.dtype == other_block.dtype
            np.testing.assert_array_equal(block, other_block)


def fused(tensors: dict) -> dict:
    """The same weights in the names that newer writers may use."""
    out = {n.replace("block_sparse_moe.gate", "mlp.gate"): t for n, t in tensors.items() if ".experts." not in n}
    for layer in range(CONFIG.num_layers):
        w1, w2, w3 = (np.stack([tensors[EXPERT.format(layer, e, i)] for e in range(CONFIG.num_experts)]) for i in (1, 2, 3))
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return out


def cast(tensors: dict, dtype) -> dict:
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_the_random_model_that_was_written(small_checkpoint, dtype):
    model = load_model(str(small_checkpoint), dtype=dtype)
    assert model.dtype == dtype
    assert_same(model, random_model(CONFIG, seed=SEED, dtype=dtype))


def test_experts_lie_in_pinned_host_memory(small_checkpoint):
    block = load_model(str(small_checkpoint)).experts[1][2]
    assert block.sharding.memory_kind == "pinned_host"
    assert block.shape == (3, CONFIG.expert_hidden, CONFIG.hidden_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_fused_and_separate_names_give_the_same(stored, dtype, small_checkpoint, tmp_path):
    tensors = cast(checkpoint_tensors(CONFIG), stored)
    separate = write_checkpoint(tmp_path / "separate", tensors=tensors)
    together = write_checkpoint(tmp_path / "fused", tensors=fused(tensors))
    assert_same(load_model(str(separate), dtype=dtype), load_model(str(together), dtype=dtype))


@pytest.mark.parametrize("chunk_bytes", [8, 200, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_read_in_many_chunks_is_the_same(chunk_bytes, dtype, small_checkpoint, monkeypatch):
    """Rows that do not divide into chunks, nor chunks into the strips of a transposing copy."""
    monkeypatch.setattr("specmoe_jax.checkpoints.tensors.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("specmoe_jax.checkpoints.tensors.TRANSPOSE_ROWS", 5)
    assert_same(load_model(str(small_checkpoint), dtype=dtype), random_model(CONFIG, seed=SEED, dtype=dtype))


def test_bfloat16_is_kept_bit_for_bit(tmp_path):
    """Every finite bit pattern, subnormals and -0 included, in experts and in other weights."""
    tensors = cast(checkpoint_tensors(CONFIG), ml_dtypes.bfloat16)
    rng = np.random.default_rng(SEED)
    for name, tensor in tensors.items():
        bits = rng.integers(0, 1 << 16, tensor.shape).astype(np.uint16)
        tensors[name] = np.where(bits & 0x7F80 == 0x7F80, 0x8000, bits).astype(np.uint16).view(ml_dtypes.bfloat16)
    model = load_model(str(write_checkpoint(tmp_path / "bits", tensors=tensors)), dtype="bfloat16")
    embed = np.asarray(model.weights.embed).view(np.uint16)
    np.testing.assert_array_equal(embed, tensors["model.embed_tokens.weight"].view(np.uint16))
    matrices = (tensors[EXPERT.format(1, 2, i)] for i in (1, 3, 2))
    np.testing.assert_array_equal(model.experts[1][2], expert_block(*matrices, "bfloat16"))


def test_tied_embeddings(tmp_path):
    raw = RAW_CONFIG | {"tie_word_embeddings": True}
    assert load_model(str(write_checkpoint(tmp_path / "tied", raw))).weights.lm_head is None


def test_eos_ids_of_both_configs(small_checkpoint):
    assert load_config(small_checkpoint).eos_token_ids == (2, 1)


def test_directory_without_tokenizer(small_checkpoint, tmp_path):
    path = shutil.copytree(small_checkpoint, tmp_path / "copy")
    (path / "tokenizer.json").unlink()
    assert load_model(str(path)).tokenizer is None


def test_unknown_dtype_is_refused(small_checkpoint):
    with pytest.raises(RequestError, match="float32, bfloat16"):
        load_model(str(small_checkpoint), dtype="int8")


def test_the_pool_of_pinned_memory_may_take_most_of_the_free_memory_or_what_the_user_says(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 128 << 30)
    monkeypatch.delenv(PINNED_LIMIT, raising=False)
    memory.raise_pinned_limit()
    assert os.environ[PINNED_LIMIT] == "96"
    monkeypatch.setenv(PINNED_LIMIT, "20")
    memory.raise_pinned_limit()
    assert os.environ[PINNED_LIMIT] == "20"


def test_peak_memory_is_the_weights_and_two_experts(tmp_path):
    """No layer, shard or whole file is held besides."""
    raw = RAW_CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 16}
    config = parse_config(raw)
    path = write_checkpoint(tmp_path / "wide", raw, checkpoint_tensors(config))
    tracemalloc.start()
    model = load_model(str(path), dtype="bfloat16")
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scratch = 4 << 20
    assert peak - current < 2 * model.expert_bytes + scratch
    assert current < model.expert_bytes * config.num_layers * config.num_experts + scratch


def test_manifest_finds_one_changed_bit(small_checkpoint, tmp_path):
    path = shutil.copytree(small_checkpoint, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="manifest"):
        load_model(str(path), verify=True)
    write_manifest(path)
    load_model(str(path), verify=True)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    name = EXPERT.format(0, 1, 2)
    tensors[name].view(np.uint32)[3, 4] ^= 1
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {name}: sha256"):
        load_model(str(path), verify=True)


def test_checkpoint_hash_is_of_the_content(small_checkpoint, tmp_path):
    path = shutil.copytree(small_checkpoint, tmp_path / "copy")
    assert checkpoint_hash(path) == checkpoint_hash(small_checkpoint)
    (path / "README.md").write_text("of no consequence")
    assert checkpoint_hash(path) == checkpoint_hash(small_checkpoint)
    (path / "config.json").write_text(json.dumps(RAW_CONFIG | {"rope_theta": 20000.0}))
    assert checkpoint_hash(path) != checkpoint_hash(small_checkpoint)


def test_checkpoint_hash_samples_what_is_large(small_checkpoint, tmp_path, monkeypatch):
    path = shutil.copytree(small_checkpoint, tmp_path / "copy")
    monkeypatch.setattr("specmoe_jax.checkpoints.manifest.WHOLE_BYTES", 1000)
    monkeypatch.setattr("specmoe_jax.checkpoints.manifest.SAMPLE_BYTES", 64)
    before = checkpoint_hash(path)
    assert before == checkpoint_hash(small_checkpoint)
    write_checkpoint(path, tensors=checkpoint_tensors(CONFIG, seed=SEED + 1))
    assert checkpoint_hash(path) != before
