"""Checkpoints written by transformers' own save_pretrained: float32 logits within 1e-4, the same argmax everywhere."""

import numpy as np
import pytest

from specmoe_jax.checkpoints import load_model

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
torch.set_num_threads(1)  # spinning threads of two runtimes on few cores made these tests ten times slower

TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=131, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
VARIANTS = {
    "odd sizes": {},
    "fused names": {},
    "tied": {"tie_word_embeddings": True},
    "top 1 of 3": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "every expert": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "head_dim from hidden": {"head_dim": None},
    "no grouping": {"num_key_value_heads": 6},
    "one KV head": {"num_key_value_heads": 1},
    "window shorter than the prompt": {"sliding_window": 5},
    "window longer than the prompt": {"sliding_window": 50},
    "rope base 10000": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
}
SHAPES = ((1, 33), (3, 12))
LENGTHS = (1, 2, 7, 64)  # besides, for one variant: each shape compiles anew


def write(path, variant: str):
    """A random model of transformers, saved by transformers, large enough in weights that every part matters."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES | VARIANTS[variant], initializer_range=0.15)
    config._attn_implementation = "eager"
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones at the start, which a loader that mixes norms up would not notice
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(path, save_original_format=variant != "fused names")
    return model


def reference_logits(model, token_ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(token_ids), use_cache=False).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_mixtral(variant, tmp_path):
    reference = write(tmp_path, variant)
    model = load_model(str(tmp_path))
    rng = np.random.default_rng(0)
    for shape in SHAPES + tuple((1, length) for length in LENGTHS if variant == "odd sizes"):
        token_ids = rng.integers(0, model.config.vocab_size, shape)
        theirs, ours = reference_logits(reference, token_ids), np.asarray(model.logits(token_ids))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
