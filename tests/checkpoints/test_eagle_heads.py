"""EAGLE heads on disk: published names load bit for bit, and whatever is wrong is said in one line."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import specmoe_jax as sm
from specmoe_jax.checkpoints.eagle import BUNDLED_HEADS
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.testing import EAGLE3_JSON, EAGLE_JSON, TINY, eagle_head, tiny


def tensors_of(head) -> dict[str, np.ndarray]:
    specs, own = spec_leaves(eagle_config.weight_specs(head.config)), head.weights.replace(to_target=None)
    tensors = {spec.name: np.asarray(leaf) for spec, leaf in zip(specs, jax.tree.leaves(own), strict=True)}
    if head.config.fused:
        ids = np.asarray(head.weights.to_target)
        tensors["d2t"] = ids.astype(np.int64) - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(TINY.vocab_size), ids)
    return tensors


class Folder:
    """A folder for a random head. `write` fills it anew, after a change of tensors and config (... removes a key)."""

    def __init__(self, path, fused):
        self.path, self.head, self._raw = path, eagle_head(tiny(), fused=fused), EAGLE3_JSON if fused else EAGLE_JSON

    def write(self, change=lambda tensors: None, **config):
        tensors = tensors_of(self.head)
        change(tensors)
        safetensors.numpy.save_file(tensors, self.path / "model.safetensors")
        raw = {key: value for key, value in (self._raw | config).items() if value is not ...}
        (self.path / "config.json").write_text(json.dumps(raw))
        return str(self.path)


@pytest.fixture(params=["eagle1", "eagle3"])
def folder(request, tmp_path):
    return Folder(tmp_path, request.param == "eagle3")


def refusal(path) -> str:
    with pytest.raises(sm.CheckpointError) as e:
        sm.load_head(path, tiny())
    assert str(e.value).isprintable() and len(str(e.value)) < 500
    return str(e.value)


def test_loads_what_was_written(folder):
    loaded = sm.load_head(folder.write(), tiny())
    assert loaded.config == folder.head.config
    for got, want in zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(folder.head.weights), strict=True):
        np.testing.assert_array_equal(got, want)
    assert loaded.embed is tiny().weights.embed


def test_half_precision_and_the_models_own_embedding_load(folder):
    def halve(tensors):
        tensors["embed_tokens.weight"] = np.asarray(tiny().weights.embed)
        tensors |= {name: t.astype(np.float16) for name, t in tensors.items() if t.dtype == np.float32}

    assert sm.load_head(folder.write(halve), tiny()).weights.fc.dtype == np.float32
    assert sm.load_head(folder.write(halve), tiny("bfloat16")).weights.fc.dtype == ml_dtypes.bfloat16


def test_another_models_embedding_is_refused(folder):
    def other(tensors):
        tensors["embed_tokens.weight"] = np.asarray(tiny().weights.embed)[::-1].copy()

    assert "262 of 263 rows are not the model's" in refusal(folder.write(other))


def test_a_missing_tensor_is_named(folder):
    for name in tensors_of(folder.head):
        assert name in refusal(folder.write(lambda tensors, name=name: tensors.pop(name)))


@pytest.mark.parametrize("name", ["layers.0.input_layernorm.weight", "layers.1.mlp.up_proj.weight", "hidden_norm", "lm_head"])
def test_an_unused_tensor_is_named(folder, name):
    assert name in refusal(folder.write(lambda tensors: tensors.update({name: np.zeros(3, np.float32)})))


def test_the_bias_goes_by_the_config(tmp_path):
    folder = Folder(tmp_path, fused=False)
    assert "fc.bias" in refusal(folder.write(bias=False))
    assert sm.load_head(folder.write(lambda tensors: tensors.pop("fc.bias"), bias=False), tiny()).weights.fc_bias is None


def test_a_transposed_tensor_says_so(folder):
    def transpose(tensors):
        tensors["fc.weight"] = np.ascontiguousarray(tensors["fc.weight"].T)

    assert "it is transposed" in refusal(folder.write(transpose))


def test_not_finite(folder):
    def spoil(tensors):
        tensors["fc.weight"] = np.where(np.arange(tensors["fc.weight"].shape[1]) == 3, np.nan, tensors["fc.weight"])

    assert "fc.weight" in refusal(folder.write(spoil))


CONFIGS = [
    ({"hidden_size": 48}, "another model"),
    ({"vocab_size": 99}, "another model"),
    ({"num_hidden_layers": 2}, "one layer"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_attention_heads": ...}, "num_attention_heads"),
    ({"intermediate_size": "x"}, "intermediate_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
]


@pytest.mark.parametrize(("changes", "said"), CONFIGS)
def test_configs_that_do_not_fit(folder, changes, said):
    assert said in refusal(folder.write(**changes))


def test_rope_base_is_10000_unless_the_config_says_otherwise(folder):
    assert folder.head.config.layer.attention.rope.frequencies[1] == pytest.approx(1e4 ** (-2 / 10))
    loaded = sm.load_head(folder.write(rope_theta=1e6), tiny())
    assert loaded.config.layer.attention.rope.frequencies[1] == pytest.approx(1e6 ** (-2 / 10))


EAGLE3 = [
    (lambda t: t.update(d2t=t["d2t"] * 0 - 1), {}, "d2t"),
    (lambda t: t.update(d2t=t["d2t"] * 9), {}, "d2t"),
    (lambda t: t.update(d2t=np.zeros(131, np.float32)), {}, "dtype is F32"),
    (lambda t: t.update(t2d=~t["t2d"]), {}, "t2d"),
    (lambda t: t.update(t2d=t["t2d"][:-1].copy()), {}, "t2d"),
    (lambda t: None, {"draft_vocab_size": 99}, "lm_head"),
    (lambda t: None, {"draft_vocab_size": ...}, "draft_vocab_size"),
    (lambda t: None, {"eagle_config": ...}, "takes three ascending ones"),
    (lambda t: None, {"eagle_config": {eagle_config.AUX_LAYERS_KEY: [0, 1, 3]}}, "features before layers (0, 1, 3) of 3"),
    (lambda t: None, {"eagle_config": {eagle_config.AUX_LAYERS_KEY: "no"}}, "must be a list"),
]


@pytest.mark.parametrize(("change", "config", "said"), EAGLE3)
def test_broken_eagle3_heads(tmp_path, change, config, said):
    assert said in refusal(Folder(tmp_path, fused=True).write(change, **config))


def renamed(tensors, rename):
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


def speculators(raw: dict, **options) -> dict:
    """The config as the speculators library nests it."""
    outer = {"speculators_model_type": "eagle3", "draft_vocab_size": raw["draft_vocab_size"], "target_hidden_size": None} | options
    outer[eagle_config.AUX_LAYERS_KEY] = raw["eagle_config"][eagle_config.AUX_LAYERS_KEY]
    layer = {key: value for key, value in raw.items() if key not in ("draft_vocab_size", "eagle_config")}
    removed = {key: ... for key in raw}
    return removed | outer | {"transformer_layer_config": layer | {"layer_types": ["full_attention"], "attention_bias": False}}


@pytest.mark.parametrize("prefix", ["layers.0.", "model.layers.0."])
@pytest.mark.parametrize("nested", [False, True])
def test_eagle3_in_the_names_of_vllm_and_speculators(nested, prefix, tmp_path):
    folder = Folder(tmp_path, fused=True)
    config = speculators(EAGLE3_JSON) if nested else {}
    path = folder.write(lambda tensors: renamed(tensors, lambda name: name.replace("midlayer.", prefix)), **config)
    loaded = sm.load_head(path, tiny())
    assert loaded.config == folder.head.config
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, folder.head.weights)


def test_norms_of_speculators_are_read(tmp_path):
    folder, size = Folder(tmp_path, fused=True), 3 * TINY.hidden_size

    def change(tensors):
        renamed(tensors, lambda name: name.replace("midlayer.", "layers.0."))
        tensors["input_norm.weight"] = np.full(size, 2.0, np.float32)

    options = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
    loaded = sm.load_head(folder.write(change, **speculators(EAGLE3_JSON, **options)), tiny())
    assert loaded.config.norm_before_residual and loaded.config.norm_before_fc and loaded.config.norm_output
    np.testing.assert_array_equal(loaded.weights.fc_norm, np.full(size, 2.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fc_norm": True}, "fc_norm is True; this family is built with False"),
        ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention']"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"norm_before_fc": True}, "input_norm.weight"),
    ],
)
def test_what_is_not_built_of_other_forms_is_named(config, said, tmp_path):
    assert said in refusal(Folder(tmp_path, fused=True).write(**config))


def test_a_head_with_the_whole_vocabulary_needs_no_tables(tmp_path):
    folder = Folder(tmp_path, fused=True)

    def widen(tensors):
        del tensors["d2t"], tensors["t2d"]
        tensors["lm_head.weight"] = np.ones((TINY.vocab_size, TINY.hidden_size), np.float32)

    loaded = sm.load_head(folder.write(widen, draft_vocab_size=TINY.vocab_size), tiny())
    np.testing.assert_array_equal(loaded.weights.to_target, np.arange(TINY.vocab_size))


@pytest.mark.slow
def test_a_head_in_torchs_own_file(folder):
    torch = pytest.importorskip("torch")
    folder.write()
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors_of(folder.head).items()}
    torch.save(tensors, folder.path / "pytorch_model.bin")
    (folder.path / "model.safetensors").unlink()
    loaded = sm.load_head(str(folder.path), tiny())
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, folder.head.weights)


def test_no_such_head():
    assert "no such directory" in refusal("no/such/head")
    assert "no such directory" in refusal("nul\0byte")


@pytest.mark.slow
def test_the_bundled_head_loads_and_is_small():
    """It is of the bundled model, and what its card says of it can be run."""
    model = sm.load_model("demo")
    head = sm.load_head("demo", model)
    assert head.weights.fc_bias is not None and not head.config.fused
    assert (BUNDLED_HEADS["demo"] / "model.safetensors").stat().st_size < 2 << 20
    with pytest.raises(sm.CheckpointError, match="another model"):
        sm.load_head("demo", tiny())
    plan = sm.PRESETS["on_demand"](model.config).replace(draft="eagle", draft_length=3)
    prompts, params = ["Call me Ishmael.", "The "], sm.SamplingParams(max_new_tokens=16, ignore_eos=True)
    engine = sm.Engine(model, plan, draft_head=head)
    tokens = [completion.token_ids for completion in engine.generate(prompts, params)]
    plain = sm.Engine(model, plan.replace(draft="none", draft_length=None)).generate(prompts, params)
    assert tokens == [completion.token_ids for completion in plain]
    assert engine.stats()["acceptance_by_position"][0] > 0.3
