"""A GGUF model of layers that are packed differently: every preset writes the same tokens, and sends what is stored."""

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import tokens_of

import specmoe_jax as sm
from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.experts import layer_bytes
from specmoe_jax.testing import EAGLE_JSON

pytest.importorskip("gguf")
from small_gguf_files import write_pair

PROMPTS = [[5, 99, 3, 17, 64, 8, 2], [77, 6, 30]]
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
TYPES = {0: ("Q8_0", "Q4_0", "Q5_0"), 1: ("Q4_0", "Q4_0", "Q4_0"), 2: ("Q4_0", "Q4_0", "Q8_0")}
CHANGES = {
    "overlap": {"link_bytes_per_s": 1e8},
    "caching": {"draft": "ngram", "draft_length": 2},
    "specmoe": {"draft_length": 3, "draft_experts": 2, "prefetch": "draft", "retain": True},
    "specmoeoff": {"draft_length": 3},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the GGUF file, the same numbers as a Hugging Face directory)"""
    return write_pair(tmp_path_factory.mktemp("gguf"), "llama", sizes={"num_hidden_layers": 3}, experts=TYPES.get)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(model, preset: str, **changes):
    plan = PRESETS[preset](model.config).replace(batch_size=2, **(CHANGES.get(preset, {}) | changes))
    raw = EAGLE_JSON | {"hidden_size": model.config.hidden_size, "vocab_size": model.config.vocab_size}
    head = eagle.random_head(eagle_config.parse_config(raw, model.config, fused=False), model)
    engine = Engine(model, plan, **({"draft_head": head} if plan.drafting.given == "draft_head" else {}))
    return tokens_of(engine.generate(PROMPTS, PARAMS)), engine.stats()


@pytest.mark.slow
def test_every_preset_writes_the_same_tokens(files):
    model, exact = (sm.load_model(str(path)) for path in files)
    logits, wanted = (m.logits([PROMPTS[0]]) for m in (model, exact))
    assert jnp.abs(logits - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    expected, _ = run(exact, "resident")
    figures = {}
    for name in PRESETS:
        tokens, figures[name] = run(model, name)
        assert tokens == expected, name
        assert figures[name]["compilations_after_warmup"] == 0, name
    sizes = layer_bytes(model.config, "float32")
    assert len(set(sizes)) == 3
    # Each pass of a stream brings every layer once: whole sums of the stored bytes cross the link, and nothing else.
    assert figures["streaming"]["link_bytes"] % (sum(sizes) * model.config.num_experts) == 0 < figures["streaming"]["link_bytes"]
    on_demand = figures["on_demand"]
    assert on_demand["on_demand_link_bytes_per_token"] == on_demand["link_bytes_per_token"]


def test_experts_on_disk(files):
    """They are read packed, and what is read is what is stored."""
    model = sm.load_model(str(files[0]), expert_tier="disk")
    assert [shape for (shape,) in model.experts.block_shapes] == list(layer_bytes(model.config, "float32"))
    assert all(model.experts.stored_bytes(i, 0) == size for i, size in enumerate(layer_bytes(model.config, "float32")))
    expected, _ = run(sm.load_model(str(files[1])), "resident")
    tokens, figures = run(model, "on_demand", expert_tier="disk", host_memory_bytes=1e6)
    assert tokens == expected
    assert figures["disk_bytes"] + figures["prefill_disk_bytes"] >= sum(layer_bytes(model.config, "float32"))


def test_decoded_on_request(files):
    model = sm.load_model(str(files[0]), expert_dtype="decoded")
    assert model.config.packing is None and np.asarray(model.experts[0][0]).dtype == np.float32
