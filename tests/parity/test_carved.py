"""Carved checkpoints against transformers: its dense Llama before, its Qwen2-MoE after."""

import numpy as np
import pytest
from small_dense_files import TEXTS, write_dense

import specmoe_jax as sm
from specmoe_jax.checkpoints.carving.carve import Sizes
from specmoe_jax.checkpoints.carving.carve_checkpoint import carve_checkpoint

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
torch.set_num_threads(1)

TOKENS = np.random.default_rng(5).integers(3, 320, (3, 40))


def theirs(kind, path):
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("top_k", [4, 2])
def test_carved(tmp_path, top_k):
    dense = write_dense(tmp_path / "dense")
    carve_checkpoint(dense, tmp_path / "carved", Sizes(shared=16, experts=4, top_k=top_k), TEXTS)
    ours = sm.load_model(str(tmp_path / "carved")).logits(TOKENS)
    np.testing.assert_allclose(ours, theirs(transformers.Qwen2MoeForCausalLM, tmp_path / "carved"), atol=1e-4)
    if top_k == 4:  # every expert chosen: the dense model
        np.testing.assert_allclose(ours, theirs(transformers.LlamaForCausalLM, dense), atol=1e-4)
