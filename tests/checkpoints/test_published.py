"""Checkpoints as they are published: base classes, prefixes, buffers, tied matrices stored twice, torch's own files."""

import json
import logging
import pickle
import sys

import numpy as np
import pytest
from test_stored_families import ALL, assert_same, stored_tensors, write

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.models.families.registry import FAMILIES, parse_config
from specmoe_jax.support.errors import CheckpointError, RequestError
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

BASES = {
    "mixtral": "MixtralModel", "qwen3_moe": "Qwen3MoeModel", "qwen2_moe": "Qwen2MoeModel", "olmoe": "OlmoeModel",
    "deepseek_v2": "DeepseekV2Model", "gpt_oss": "GptOssModel", "llama4": "Llama4TextModel", "nllb_moe": "NllbMoeModel",
    "deepseek_v3": "DeepseekV3Model", "glm4_moe": "Glm4MoeModel", "glm4_moe_lite": "Glm4MoeLiteModel",
    "granite_moe": "GraniteMoeModel", "minimax_m2": "MiniMaxM2Model", "qwen3_next": "Qwen3NextModel",
    "qwen3_5_moe": "Qwen3_5MoeTextModel", "deepseek_v32": "DeepseekV32Model", "glm_moe_dsa": "GlmMoeDsaModel",
    "mimo_v2_flash": "MiMoV2FlashModel",
}  # fmt: skip


def without_prefix(tensors: dict) -> dict:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", BASES)
def test_a_base_class_and_its_names(family, tmp_path):
    """Saved from the base class: no `model.` before the names; the output matrix beside them where it is not tied."""
    model = tiny_family(family)
    path = write(tmp_path / "base", ALL[family] | {"architectures": [BASES[family]]}, without_prefix(stored_tensors(model, 0)))
    assert_same(load_model(str(path)), model)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("family", BASES)
def test_names_of_a_wrapper(family, prefix, tmp_path):
    """The text part beside others, whose tensors are left alone."""
    model = tiny_family(family)
    tensors = {
        prefix + name.removeprefix("model.") if "lm_head" not in name else name: t for name, t in stored_tensors(model, 0).items()
    }
    others = {name: np.zeros(2, np.float32) for name in ("vision_model.a", "model.visual.b.weight", "multi_modal_projector.c")}
    assert_same(load_model(str(write(tmp_path / "wrapped", ALL[family], tensors | others))), model)


def test_an_output_matrix_that_was_left_out_is_told(tmp_path):
    tensors = without_prefix(stored_tensors(tiny_family("mixtral"), 0))
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head.weight: was it saved from the base class, and the output matrix left out"):
        load_model(str(write(tmp_path / "base", ALL["mixtral"] | {"architectures": ["MixtralModel"]}, tensors)))


@pytest.mark.parametrize("family", ALL)
def test_model_type_where_no_class_is_named(family):
    named = parse_config(ALL[family])
    for empty in ({}, {"architectures": None}, {"architectures": []}):
        raw = {key: value for key, value in ALL[family].items() if key != "architectures"} | empty
        assert parse_config(raw) == named


def test_every_family_is_here():
    assert set(ALL) == set(FAMILIES)
    assert set(BASES) == set(FAMILIES) - {"qwen3_vl_moe"}  # whose text part is a base class by itself


TYPES = [("kimi_k2", "deepseek_v3"), ("granitemoe", "granite_moe"), ("llama4_text", "llama4")]


@pytest.mark.parametrize(("model_type", "family"), TYPES)
def test_other_model_types(model_type, family):
    raw = {key: value for key, value in ALL[family].items() if key != "architectures"} | {"model_type": model_type}
    assert parse_config(raw).family == family


def test_an_unknown_model_type_is_named():
    with pytest.raises(CheckpointError, match=r"no architectures, and model_type is 'zebra'; this version runs MixtralForCausalLM"):
        parse_config({"model_type": "zebra"})
    with pytest.raises(CheckpointError, match=r"architectures is \['ZebraModel'\]"):
        parse_config(ALL["mixtral"] | {"architectures": ["ZebraModel"]})  # a class that is named is believed, not model_type


def test_buffers_are_ignored_and_said_so(tmp_path, caplog):
    tensors = stored_tensors(tiny_family("mixtral"), 0)
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    with caplog.at_level(logging.DEBUG, logger="specmoe_jax"):
        assert_same(load_model(str(write(tmp_path / "buffers", ALL["mixtral"], tensors))), tiny_family("mixtral"))
    assert "model.layers.2.self_attn.rotary_emb.inv_freq" in caplog.text


def tied(family: str, tmp_path, change=0.0, dtype=np.float32):
    """A tied checkpoint that stores its output matrix as well."""
    raw = ALL[family] | {"tie_word_embeddings": True}
    tensors = stored_tensors(tiny_family(family), 0)
    embedding = tensors["model.shared.weight" if family == "nllb_moe" else "model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.astype(dtype)
    tensors["lm_head.weight"][-1, -1] += change
    return write(tmp_path / "tied", raw, tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "nllb_moe"])
def test_a_tied_matrix_that_is_stored_again(family, tmp_path):
    assert load_model(str(tied(family, tmp_path))).weights.lm_head is None


@pytest.mark.parametrize("family", ["qwen3_moe", "nllb_moe"])
def test_a_tied_matrix_that_differs_is_refused(family, tmp_path):
    path = tied(family, tmp_path, change=1e-6)
    for read in (lambda: load_model(str(path)), lambda: convert(str(path), tmp_path / "new", to="specmoe")):
        with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from model\..*tie_word_embeddings"):
            read()


def test_a_tied_matrix_of_another_type(tmp_path):
    import ml_dtypes

    assert load_model(str(tied("qwen3_moe", tmp_path, dtype=ml_dtypes.bfloat16))).weights.lm_head is None


# ---- torch's own files


def write_torch(path, raw: dict, tensors: dict[str, np.ndarray], shards: int = 2):
    """pytorch_model-*.bin with an index, as NLLB-MoE is published; or one file without."""
    torch = pytest.importorskip("torch")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    owners = {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        names = sorted(tensors)[shard::shards]
        torch.save({name: torch.from_numpy(np.array(tensors[name])) for name in names}, path / file)
        owners |= dict.fromkeys(names, file)
    if shards > 1:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": owners}))
    return path


def published_nllb(tmp_path, shards: int = 2):
    """As facebook/nllb-moe-54b: the base class, names without prefix, the embedding stored three times, torch's files."""
    tensors = without_prefix(stored_tensors(tiny_family("nllb_moe"), 0))
    tensors |= {f"{part}.embed_tokens.weight": tensors["shared.weight"] for part in ("encoder", "decoder")}
    tensors["encoder.embed_positions.weights"] = np.zeros((98, 42), np.float32)
    return write_torch(tmp_path / "nllb", ALL["nllb_moe"] | {"architectures": ["NllbMoeModel"]}, tensors, shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("to", ["specmoe", "huggingface"])
def test_torch_files_convert(to, shards, tmp_path):
    converted = convert(str(published_nllb(tmp_path, shards)), tmp_path / "new", to=to)
    assert_same(load_model(str(converted)), tiny_family("nllb_moe"))
    assert json.loads((converted / "config.json").read_text())["architectures"] == ["NllbMoeForConditionalGeneration"]


@pytest.mark.parametrize("family", [family for family in RAW_CONFIGS if family != "llama4"])
def test_torch_files_of_other_families(family, tmp_path):
    path = write_torch(tmp_path / "torch", ALL[family], stored_tensors(tiny_family(family), 0))
    assert_same(load_model(str(convert(str(path), tmp_path / "new", to="specmoe"))), tiny_family(family))


def test_half_precision_of_torch_is_kept(tmp_path):
    torch = pytest.importorskip("torch")
    path = published_nllb(tmp_path, shards=1)
    stored = torch.load(path / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}, path / "pytorch_model.bin")
    converted = convert(str(path), tmp_path / "new", to="specmoe")
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_model(str(converted), dtype="bfloat16"), tiny_family("nllb_moe", "bfloat16"))


def test_loading_torch_files_says_the_command(tmp_path):
    with pytest.raises(CheckpointError, match=r"specmoe convert --model=.*nllb --output=NEW_DIR --format=specmoe"):
        load_model(str(published_nllb(tmp_path)))


def test_converting_without_torch_says_what_to_install(tmp_path, monkeypatch):
    path = published_nllb(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RequestError, match=r"needs torch; install it: pip install specmoe_jax\[torch\]"):
        convert(str(path), tmp_path / "new", to="specmoe")


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("damage", ["pickle", "hostile", "cut", "list", "strided"])
def test_damaged_torch_files_are_refused_and_run_nothing(damage, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = published_nllb(tmp_path, shards=1)
    file = path / "pytorch_model.bin"
    stored = torch.load(file, weights_only=True)
    if damage == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "hostile":
        torch.save(stored | {"x": Hostile()}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5000])
    elif damage == "list":
        torch.save(list(stored.values()), file)
    else:
        torch.save(stored | {"shared.weight": stored["shared.weight"].T.contiguous().T}, file)
    with pytest.raises(CheckpointError, match=r"^pytorch_model.bin: ") as caught:
        convert(str(path), tmp_path / "new", to="specmoe")
    assert str(caught.value).isprintable() and "ran" not in capsys.readouterr().out
