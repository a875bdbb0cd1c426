"""model.logits and its modules against what transformers computed, kept in golden files: needs no torch."""

import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmoe_jax.checkpoints import checkpoint_hash, checkpoint_path, load_model
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.models import layers
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import random_model, reference_attention
from specmoe_jax.ops.xla.experts import block_ffn

TOLERANCE = 1e-4
REGENERATE = "run: python tests/golden/regenerate.py"
RANDOM = list(golden_models.RAW_CONFIGS)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(golden_models.golden_file(name)) as file:
        return dict(file)


@functools.cache
def random_reference(name: str):
    return random_model(golden_models.odd_config(name), seed=golden_models.SEED)


@functools.cache
def demo():
    if not (BUNDLED["demo"] / "config.json").exists():
        pytest.skip("the bundled model is not there")
    return load_model("demo")


@functools.partial(jax.jit, static_argnums=0)
def layer_modules(config, weights, blocks, h) -> dict[str, jax.Array]:
    """What one layer computes on the way, and h after it; jitted whole, since op by op it compiles ten times longer."""
    batch, length, _ = h.shape
    positions, valid = jnp.broadcast_to(jnp.arange(length), (batch, length)), jnp.ones((batch, length), bool)
    q, k, v = layers.pre_attention(config, weights, h, positions)
    attended = reference_attention(config.attention, q, k, v)
    after, x, routing = layers.post_attention(config, weights, h, attended, valid)
    outputs = jnp.stack([block_ffn(x, block) for block in blocks], axis=1)
    chosen = jnp.take_along_axis(outputs, routing.ids[..., None], axis=1)
    moe = layers.combine(jnp.zeros_like(after), chosen, routing)
    return {
        "attention": after - h,
        "router_ids": routing.ids,
        "router_weights": routing.weights,
        "moe": moe,
        "h": after + moe,
    }


def modules(name: str) -> dict[str, jax.Array]:
    """The same names as in the golden file, from our layers."""
    model, token_ids = random_reference(name), jnp.asarray(golden(name)[f"prompt{len(golden_models.RANDOM_SHAPES) - 1}"])
    h = layers.embed(model.weights, token_ids)
    found = {"embed": h}
    for i, (weights, blocks) in enumerate(zip(model.weights.layers, model.experts, strict=True)):
        outputs = layer_modules(model.config.layers[i], weights, [jax.device_put(b, jax.memory.Space.Device) for b in blocks], h)
        h = outputs.pop("h")
        found |= {f"layer{i}.{key}": value for key, value in outputs.items()}
    return found


def assert_agrees(ours: np.ndarray, theirs: np.ndarray):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("prompt", range(len(golden_models.RANDOM_SHAPES)))
@pytest.mark.parametrize("name", RANDOM)
def test_logits_of_random_models(name, prompt):
    kept = golden(name)
    assert_agrees(np.asarray(random_reference(name).logits(kept[f"prompt{prompt}"])), kept[f"logits{prompt}"])


@pytest.mark.parametrize("name", RANDOM)
def test_modules_of_random_models(name):
    ours, kept = modules(name), golden(name)
    assert {key for key in kept if not key.startswith(("prompt", "logits"))} == set(ours)
    for key, value in ours.items():
        if key.endswith("router_ids"):
            np.testing.assert_array_equal(value, kept[key], err_msg=key)
        else:
            np.testing.assert_allclose(value, kept[key], rtol=0, atol=TOLERANCE, err_msg=key)


def test_the_window_matters():
    """Negative control: without its window the windowed model misses its golden logits by far."""
    kept = golden("windowed")
    config = parse_config(golden_models.RAW_CONFIGS["windowed"] | {"sliding_window": None})
    unlimited = random_model(config, seed=golden_models.SEED)
    assert np.abs(np.asarray(unlimited.logits(kept["prompt2"])) - kept["logits2"]).max() > 100 * TOLERANCE


def test_demo_golden_belongs_to_the_bundled_model():
    demo()
    kept = str(golden("demo")["checkpoint_hash"])
    assert checkpoint_hash(checkpoint_path("demo")) == kept, f"the bundled model has changed; {REGENERATE} demo"


@pytest.mark.parametrize("prompt", range(len(golden_models.DEMO_TEXTS)))
def test_logits_of_the_demo(prompt):
    model, kept = demo(), golden("demo")
    ours = np.asarray(model.logits(kept[f"prompt{prompt}"]))
    theirs = kept[f"logits{prompt}"]
    np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), kept[f"argmax{prompt}"])


@pytest.mark.parametrize("prompt", range(len(golden_models.DEMO_TEXTS)))
def test_demo_tokenizer_still_gives_the_prompts(prompt):
    np.testing.assert_array_equal([demo().tokenizer.encode(golden_models.DEMO_TEXTS[prompt])], golden("demo")[f"prompt{prompt}"])
