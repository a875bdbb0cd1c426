"""LoRA adapters merged at load: by hand-computed sums, and against PEFT's own merge where it is installed."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from engine_cases import PROMPTS, plan, run
from family_files import stored_tensors, write

from specmoe_jax import CheckpointError
from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.adapters.merge import adapted
from specmoe_jax.checkpoints.adapters.peft import adapter_hash, read_adapter
from specmoe_jax.checkpoints.files import open_checkpoint
from specmoe_jax.checkpoints.inventory import take_inventory
from specmoe_jax.checkpoints.loader import load_config
from specmoe_jax.checkpoints.manifest import model_hash
from specmoe_jax.testing import TINY_JSON, write_tiny
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

RANK, ALPHA = 3, 5.0
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False, "target_modules": ["q_proj"]}
ATTENTION, EXPERT, ROUTER = "self_attn.q_proj", "block_sparse_moe.experts.2.w2", "block_sparse_moe.gate"
LAYER = "base_model.model.model.layers.1"


def pair(name, out, inputs, rank=RANK):
    rng = np.random.default_rng([*name.encode()])
    a, b = rng.standard_normal((rank, inputs), np.float32) * 0.1, rng.standard_normal((out, rank), np.float32)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def write_adapter(folder, tensors, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def usual():
    heads, hidden, expert = 48, TINY_JSON["hidden_size"], TINY_JSON["intermediate_size"]
    return (
        pair(f"{LAYER}.{ATTENTION}", heads, hidden)
        | pair(f"{LAYER}.{EXPERT}", hidden, expert)
        | pair(f"{LAYER}.{ROUTER}", TINY_JSON["num_local_experts"], hidden, rank=2)
    )


def product(tensors, name, scale):
    return (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]) * np.float32(scale)


@pytest.mark.every_case
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_by_hand(folder, tmp_path, tier, dtype):
    """Attention, an expert and a router of another rank and scale: W + scale * B A in float32, then rounded once."""
    tensors = usual()
    patterns = {"rank_pattern": {"gate": 2}, "alpha_pattern": {r"layers\.1\.block_sparse_moe\.gate": 8}}
    adapter = write_adapter(tmp_path / "adapter", tensors, **patterns)
    plain = load_model(str(folder))
    merged = load_model(str(folder), dtype=dtype, expert_tier=tier, adapter=adapter)
    rounded = (lambda x: x) if dtype == "float32" else lambda x: x.astype(ml_dtypes.bfloat16)

    def block(model, layer, expert):
        found = np.asarray(model.experts[layer][expert])
        return found if found.dtype == np.float32 else found.view(ml_dtypes.bfloat16)

    own, other = merged.weights.layers[1], plain.weights.layers[1]
    for name, leaf, scale in ((ATTENTION, "q", ALPHA / RANK), (ROUTER, "router", 8 / 2)):
        expected = np.asarray(getattr(other, leaf)) + product(tensors, f"{LAYER}.{name}", scale)
        np.testing.assert_array_equal(np.asarray(getattr(own, leaf)), rounded(expected))
    expected = np.array(block(plain, 1, 2))
    expected[2] += product(tensors, f"{LAYER}.{EXPERT}", ALPHA / RANK).T
    np.testing.assert_array_equal(block(merged, 1, 2), rounded(expected))
    np.testing.assert_array_equal(block(merged, 1, 3), rounded(block(plain, 1, 3)))
    np.testing.assert_array_equal(np.asarray(merged.weights.layers[0].q), rounded(np.asarray(plain.weights.layers[0].q)))
    assert merged.path == plain.path and model_hash(merged) != model_hash(plain)


def test_an_engine_of_the_disk_tier_computes_with_the_merged_experts(folder, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", usual(), rank_pattern={"gate": 2}, use_rslora=True)
    on_disk = load_model(str(folder), expert_tier="disk", adapter=adapter)
    by_plan = {
        name: run(load_model(str(folder), adapter=adapter) if name == "resident" else on_disk, plan(name, **changes), PROMPTS[:2])[
            0
        ]
        for name, changes in {"resident": {}, "specmoe": {"expert_tier": "disk", "host_memory_bytes": 1 << 20}}.items()
    }
    assert by_plan["resident"] == by_plan["specmoe"] != run(load_model(str(folder)), plan("resident"), PROMPTS[:2])[0]


@pytest.mark.every_case
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_parameters_of_all_experts(family, tmp_path):
    """PEFT's target_parameters: two nested wrappers whose names do not say which parameter, and B with the ranks outside."""
    model = tiny_family(family)
    path = write(tmp_path / "model", RAW_CONFIGS[family], stored_tensors(model, 0))
    config, moe, layer = model.config, 0, model.config.expert_layers[0]
    count, hidden, wide = config.num_experts, config.hidden_size, config.expert_hidden
    module = f"base_model.model.model.layers.{layer}.mlp.experts"
    module = module if family != "llama4" else module.replace("mlp", "feed_forward")
    up, down = (2 * wide, hidden), (hidden, wide)
    if family == "llama4":  # kept as [in, out], of which PEFT knows nothing
        up, down = up[::-1], down[::-1]
    tensors = {}
    for name, (out, inputs) in ((f"{module}.base_layer", up), (module, down)):
        rng = np.random.default_rng(3)
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((count * RANK, inputs), np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((out, RANK * count), np.float32)
    merged = load_model(str(path), adapter=write_adapter(tmp_path / "adapter", tensors))
    blocks = np.asarray(model.experts[moe][1]), np.asarray(merged.experts[moe][1])
    difference = blocks[1] - blocks[0]
    expected = {}
    for name, key in ((f"{module}.base_layer", "up"), (module, "down")):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        delta = b.reshape(len(b), RANK, count)[:, :, 1] @ a.reshape(count, RANK, -1)[1] * (ALPHA / RANK)
        expected[key] = delta.T if family == "llama4" else delta  # [out, in]
    if family == "gpt_oss":  # bordered; gate and up alternate
        gate, up, down = expected["up"][::2], expected["up"][1::2], expected["down"]
        difference = difference[:, :-1, :-1]
    else:
        gate, up, down = expected["up"][:wide], expected["up"][wide:], expected["down"]
    np.testing.assert_allclose(difference, np.stack([gate, up, down.T]), atol=2e-5)
    np.testing.assert_array_equal(np.asarray(merged.experts[1][0]), np.asarray(model.experts[1][0]))


BAD = {
    "unknown": (pair(f"{LAYER}.self_attn.z_proj", 48, 40), {}, "model has no matrix of this name"),
    "shape": (pair(f"{LAYER}.{ATTENTION}", 47, 40), {}, r"is of \[47, 40\], the model's matrix of \[48, 40\]"),
    "rank": (pair(f"{LAYER}.{ATTENTION}", 48, 40, rank=2), {}, "rank 2, but adapter_config.json says 3"),
    "dora": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"use_dora": True}, "use_dora is True; only False is merged"),
    "bias": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"bias": "all"}, "bias is all; only none is merged"),
    "other kind": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"peft_type": "IA3"}, "peft_type is IA3"),
    "weights": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "pissa": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
    "alpha": (pair(f"{LAYER}.{ATTENTION}", 48, 40), {"lora_alpha": "big"}, "lora_alpha is big"),
    "tensor": ({f"{LAYER}.{ATTENTION}.weight": np.zeros((2, 2), np.float32)}, {}, "no lora_A or lora_B"),
    "half": ({f"{LAYER}.{ATTENTION}.lora_A.weight": np.ones((3, 40), np.float32)}, {}, r"holds lora_A \[3, 40\]; expected"),
}


@pytest.mark.every_case
@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_merged_is_refused_in_one_line(folder, tmp_path, case):
    tensors, config, message = case
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(str(folder), adapter=write_adapter(tmp_path / "adapter", tensors, **config))
    assert "\n" not in str(caught.value)


def test_a_missing_directory_and_packed_experts_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory; give one with adapter_config"):
        load_model(str(folder), adapter=tmp_path / "nowhere")
    config = load_config(folder)
    inventory = take_inventory(config, open_checkpoint(folder))
    packed = [
        [source._replace(config=dataclasses.replace(source.config, packing="fp8")) for source in layer]
        for layer in inventory.experts
    ]
    adapter = read_adapter(write_adapter(tmp_path / "adapter", usual(), rank_pattern={"gate": 2}))
    with pytest.raises(CheckpointError, match="its experts are packed and cannot be merged; load them with expert_dtype=decoded"):
        adapted(config, inventory._replace(experts=packed), adapter)
    assert adapter_hash(write_adapter(tmp_path / "a", usual())) != adapter_hash(write_adapter(tmp_path / "b", usual(), r=4))
