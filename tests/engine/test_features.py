"""Hidden states of texts: the reference's at every layer, in every flow, and as shards that go on where they stopped."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_cases import PROMPTS, plan

import specmoe_jax as sm
from specmoe_jax.jobs.features import read_features, write_features
from specmoe_jax.models import layers
from specmoe_jax.models.model import _reference_layer
from specmoe_jax.testing import TINY

ASKED = (3, 0, 2)  # in an order of their own; 3 is after the final norm
CASES = {
    "resident": ("resident", {}),
    "streaming": ("streaming", {"batch_size": 2, "prefill_chunk": 8}),
    "specmoe": ("specmoe", {"batch_size": 3, "draft_length": 3, "prefill_chunk": 8}),
    "host cache": ("on_demand", {"batch_size": 3, "kv_tier": "host"}),
}


def reference(model, tokens):
    """[layers + 1, n, M], without a cache."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    h = layers.embed(model.weights, jnp.asarray(padded))
    found = [h]
    for config, weights, blocks in zip(TINY.layers, model.weights.layers, model.experts, strict=True):
        h = _reference_layer(config, weights, [jax.device_put(b, jax.memory.Space.Device) for b in blocks], h, None)
        found.append(h)
    found[-1] = layers.final_norm(TINY.head, model.weights, h)
    return np.stack([np.asarray(x)[0, : len(tokens)] for x in found])


@pytest.fixture(scope="module")
def expected(model):
    return [reference(model, tokens) for tokens in PROMPTS]


@pytest.mark.every_case
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hidden_states_are_those_of_the_reference(model, expected, case):
    preset, changes = case
    engine = sm.Engine(model, plan(preset, **changes))
    found = list(engine.features(PROMPTS, layers=ASKED))
    assert [one.token_ids for one in found] == list(PROMPTS)
    for one, states in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.hidden, states[list(ASKED)], atol=3e-5)


def test_texts_and_the_last_layer_alone(model, expected):
    engine = sm.Engine(model, plan("resident"))
    (text, again) = engine.features(["abc", model.tokenizer.encode("abc")])
    np.testing.assert_array_equal(text.hidden, again.hidden)
    assert text.hidden.shape == (1, 3, TINY.hidden_size)


@pytest.mark.every_case
@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_shards_go_on_where_they_stopped(model, expected, form, tmp_path, monkeypatch):
    engine, folder = sm.Engine(model, plan("resident")), str(tmp_path / "features")
    how = {"layers": ASKED, "form": form, "texts_per_shard": 3}
    read, real = [], engine.features

    def features(texts, **options):
        if len(read) == 2:
            raise KeyboardInterrupt  # as the third shard begins
        read.append(texts)
        return real(texts, **options)

    monkeypatch.setattr(engine, "features", features)
    with pytest.raises(KeyboardInterrupt):
        write_features(engine, PROMPTS, folder, **how)
    with pytest.raises(sm.RequestError, match=r"features-00002.* is missing; run the command"):
        list(read_features(folder))
    del read[:]
    write_features(engine, PROMPTS, folder, **how)
    assert read == [list(PROMPTS[6:])]
    for one, tokens, states in zip(read_features(folder), PROMPTS, expected, strict=True):
        assert one.token_ids == tokens
        np.testing.assert_allclose(one.hidden, states[list(ASKED)], atol=3e-5)
    with pytest.raises(sm.RequestError, match="was begun with other layers"):
        write_features(engine, PROMPTS, folder, **how | {"layers": (1,)})


def test_half_precision(model, tmp_path):
    engine = sm.Engine(model, plan("resident"))
    write_features(engine, PROMPTS[:2], str(tmp_path), dtype="bfloat16")
    assert next(read_features(str(tmp_path))).hidden.dtype == ml_dtypes.bfloat16


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine, folder: engine.features(PROMPTS, layers=(4,)), r"layers is \[4\]; give different ones of 0"),
        (lambda engine, folder: engine.features(PROMPTS, layers=(1, 1)), "give different ones"),
        (lambda engine, folder: engine.features(PROMPTS, layers=("a",)), "give whole numbers"),
        (lambda engine, folder: engine.features([]), "no prompts"),
        (lambda engine, folder: write_features(engine, PROMPTS, folder, form="npy", dtype="bfloat16"), "npy has no bfloat16"),
        (lambda engine, folder: list(read_features(folder)), "holds no features"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, call, message, tmp_path):
    with pytest.raises(sm.RequestError, match=message):
        call(sm.Engine(model, plan("resident")), str(tmp_path))
