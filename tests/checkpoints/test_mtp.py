"""The layer for further tokens in a checkpoint: found in every layout, refused in one line where it is not whole."""

import jax
import numpy as np
import pytest
from family_files import stored_tensors, write

from specmoe_jax import load_model, load_mtp
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.mtp import find_mtp
from specmoe_jax.models import mtp
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import random_model
from specmoe_jax.models.spec import random_tensor, spec_leaves
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

FAMILIES = ("glm4_moe", "deepseek_v3")


def layer_tensors(model, layout: int = 0) -> dict[str, np.ndarray]:
    """Those of mtp.random_head, by name."""
    head, config = mtp.random_head(model), model.config
    tensors = {spec.name: random_tensor(spec, 0) for spec in spec_leaves(mtp.weight_specs(config))}
    for expert in range(config.num_experts):
        for part in mtp.expert_layouts(config, expert)[layout]:
            values = part.view(np.asarray(head.experts[expert]))
            target = tensors.setdefault(part.name, np.zeros(part.spec.shape, np.float32))
            target = target if part.index is None else target[part.index]
            target[...] = values.reshape(target.shape)
    return tensors


def checkpoint(folder, family: str, added: dict, **changes):
    return write(folder, RAW_CONFIGS[family] | changes, stored_tensors(tiny_family(family), 0) | added)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_loaded(family, layout, tmp_path):
    """Beside the copies that published files hold of the embedding and the output matrix."""
    prefix, copy = f"model.layers.{RAW_CONFIGS[family]['num_hidden_layers']}", np.zeros((2, 2), np.float32)
    copies = {f"{prefix}.embed_tokens.weight": copy, f"{prefix}.shared_head.head.weight": copy}
    path = checkpoint(tmp_path / "checkpoint", family, layer_tensors(tiny_family(family), layout) | copies)
    model = load_model(str(path))
    loaded, expected = load_mtp(model), mtp.random_head(tiny_family(family))
    assert loaded.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, (loaded.weights, loaded.experts), (expected.weights, expected.experts))
    assert loaded.embed is model.weights.embed and loaded.output is model.weights.lm_head


def test_bfloat16(tmp_path):
    path = checkpoint(tmp_path / "checkpoint", "glm4_moe", layer_tensors(tiny_family("glm4_moe")))
    head = load_mtp(load_model(str(path), dtype="bfloat16"))
    assert head.experts.dtype == np.uint16 and head.weights.fc.dtype == "bfloat16"
    assert head.weights.layer.choice_bias.dtype == np.float32


def refusal(path) -> str:
    """Of what is there; the model itself loads."""
    with pytest.raises(CheckpointError) as caught:
        find_mtp(path, load_model(str(path)).config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_without_it(tmp_path):
    """As many conversions leave it."""
    found = refusal(checkpoint(tmp_path / "checkpoint", "glm4_moe", {}))
    assert "holds no tensor model.layers.3.*, which draft=mtp needs; many conversions leave that layer out" in found


def test_a_part_of_it(tmp_path):
    tensors = layer_tensors(tiny_family("glm4_moe"))
    del tensors["model.layers.3.eh_proj.weight"], tensors["model.layers.3.mlp.experts.4.up_proj.weight"]
    assert "2 tensors missing that config.json asks for" in refusal(checkpoint(tmp_path / "first", "glm4_moe", tensors))
    tensors = layer_tensors(tiny_family("glm4_moe")) | {"model.layers.3.what.weight": np.zeros(3, np.float32)}
    assert "1 tensor that this model does not use: model.layers.3.what" in refusal(
        checkpoint(tmp_path / "second", "glm4_moe", tensors)
    )


def test_none_or_several(tmp_path):
    path = checkpoint(tmp_path / "none", "glm4_moe", {}, num_nextn_predict_layers=0)
    assert "num_nextn_predict_layers is 0; draft=mtp needs a layer" in refusal(path)
    path = checkpoint(tmp_path / "one", "glm4_moe", layer_tensors(tiny_family("glm4_moe")), num_nextn_predict_layers=2)
    assert "tensors missing that config.json asks for: model.layers.4." in refusal(path)


LAYERS = {"glm4_moe": {"num_nextn_predict_layers": 2}, "qwen3_next": {}, "qwen3_5_moe": {}, "mimo_v2_flash": {}}


@pytest.mark.parametrize("family", LAYERS)
def test_layers_under_their_published_names(family, tmp_path):
    """Several, apart from the others, or without experts; quantised where that is asked for."""
    raw = RAW_CONFIGS[family] | LAYERS[family]
    model = random_model(parse_config(raw))
    config, tensors, experts = model.config, {}, 0
    expected = mtp.random_head(model)
    for index, head in enumerate(expected.chain):
        tensors |= {spec.name: random_tensor(spec, 0) for spec in spec_leaves(mtp.weight_specs(config, index))}
        if head.experts is not None:
            experts += 1
            for expert in range(config.num_experts):
                for part in mtp.expert_layouts(config, expert, index)[0]:
                    tensors[part.name] = np.array(part.view(np.asarray(head.experts[expert])))
    tensors = {published(family, config.num_layers, name): tensor for name, tensor in tensors.items()}
    loaded = load_model(str(write(tmp_path / "checkpoint", raw, stored_tensors(model, 0) | tensors)))
    assert len(expected.chain) == config.mtp_layers and experts in (0, config.mtp_layers)
    for ours, theirs in zip(load_mtp(loaded).chain, expected.chain, strict=True):
        assert ours.config == theirs.config
        jax.tree.map(np.testing.assert_array_equal, (ours.weights, ours.experts), (theirs.weights, theirs.experts))
    if experts:
        packed, held = load_mtp(loaded, expert_dtype="int8"), mtp.random_head(model, expert_dtype="int8")
        np.testing.assert_array_equal(packed.experts, held.experts)
        assert packed.experts.dtype == np.uint8


def published(family: str, count: int, name: str) -> str:
    """The name of a tensor of such a layer in the files of its family."""
    if family == "mimo_v2_flash":
        for index in range(3):
            name = name.replace(f"model.layers.{count + index}.", f"model.mtp.layers.{index}.")
        return name.replace("post_attention_layernorm", "pre_mlp_layernorm").replace("shared_head.norm", "final_layernorm")
    if not family.startswith("qwen"):
        return name
    own = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_head.norm": "norm"}
    inner = name.removeprefix(f"model.layers.{count}.").removesuffix(".weight")
    return f"mtp.{own.get(inner, f'layers.0.{inner}')}.weight"


@pytest.mark.parametrize("way", ["specmoe", "huggingface", "orbax"])
def test_a_conversion_keeps_it(way, tmp_path):
    """There and back; the model beside it is read as before."""
    path = checkpoint(tmp_path / "checkpoint", "deepseek_v3", layer_tensors(tiny_family("deepseek_v3")))
    path = convert(str(path), tmp_path / way, to=way)
    path = convert(str(path), tmp_path / "again", to="specmoe") if way == "orbax" else path
    loaded, expected = load_mtp(load_model(str(path))), mtp.random_head(tiny_family("deepseek_v3"))
    jax.tree.map(np.testing.assert_array_equal, (loaded.weights, loaded.experts), (expected.weights, expected.experts))
