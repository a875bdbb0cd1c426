"""NLLB-MoE against transformers: ragged sources, logits within 1e-4, the same argmax, the same greedy translation.

transformers 5.23 sends every token to experts 0 and 1 of a layer, whatever its router chose (the mask of first choices is
taken for expert ids); `intended` below is what its 4.x releases do. `python tests/parity/test_nllb_moe.py FOLDER` writes a
checkpoint with logits of whatever release is installed, so that a 4.x one can be compared with: `COMPARE=FOLDER pytest`
reads it.
"""

import json
import os
import pathlib
import sys

import numpy as np
import pytest

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
modeling = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe", reason=REASON)
torch.set_num_threads(1)

RAW = {
    "vocab_size": 131, "max_position_embeddings": 96, "d_model": 42, "encoder_layers": 3, "decoder_layers": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 3,
    "encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_experts": 6,
}  # fmt: skip
VARIANTS = (
    {},
    {"scale_embedding": False, "moe_token_dropout": 0.0, "normalize_router_prob_before_dropping": True},
    {"decoder_sparse_step": 1, "encoder_sparse_step": 0, "encoder_ffn_dim": 40, "batch_prioritized_routing": True},
)
SOURCES = ((5, 99, 3, 17, 64, 8, 13, 120, 44, 9, 31), (77, 30), (4,))
TARGETS = np.random.default_rng(0).integers(3, 131, (3, 12))
TOLERANCE, FORCED = 1e-4, 11


def intended(experts, hidden_states, router_mask, router_probs):
    """Each token through the experts that its weights name, scaled as in evaluation."""
    mixed = torch.zeros_like(hidden_states)
    for index in range(experts.num_experts):
        expert = experts[f"expert_{index}"]
        rows = router_probs[:, index].nonzero()[:, 0]
        weights = router_probs[rows, index, None] * (1 - experts.moe_token_dropout)
        mixed.index_add_(0, rows, weights * expert(hidden_states[rows]))
    return mixed


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Sources [B, S], padded with the padding token, and their lengths."""
    lengths = np.array([len(source) for source in SOURCES])
    ids = np.ones((len(SOURCES), lengths.max()), np.int64)
    for row, source in zip(ids, SOURCES, strict=True):
        row[: len(source)] = source
    return ids, lengths


def write(path, changes: dict):
    """A random model of transformers, saved by transformers, large enough in weights that every part matters."""
    torch.manual_seed(0)
    model = transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**RAW | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.15 if "shared" in name else 0.3
            weight.copy_(float("norm.weight" in name) + scale * torch.randn_like(weight))
    model.generation_config.forced_bos_token_id = FORCED
    model.generation_config.max_length = None
    model.save_pretrained(path)
    return model


def reference_logits(model) -> np.ndarray:
    ids, lengths = padded()
    mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=mask, decoder_input_ids=torch.from_numpy(TARGETS)).logits.numpy()


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    print(f"nllb_moe: largest difference of a logit {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    assert len(set(ours.argmax(-1).flatten().tolist())) > 3


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setattr(modeling.NllbMoeExperts, "forward", intended)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "default")
def test_logits(changes, reference, tmp_path):
    from specmoe_jax.checkpoints import load_model

    theirs = reference_logits(write(tmp_path, changes))
    assert_near(np.asarray(load_model(str(tmp_path)).logits(TARGETS, *padded())), theirs)


@pytest.mark.parametrize("preset", ["resident", "on_demand", "specmoe"])
def test_greedy_translation(preset, reference, tmp_path):
    from specmoe_jax import PRESETS, Engine, SamplingParams
    from specmoe_jax.checkpoints import load_model

    reference_model = write(tmp_path, {"scale_embedding": False})
    ids, lengths = padded()
    mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    theirs = reference_model.generate(
        torch.from_numpy(ids), attention_mask=mask, max_new_tokens=13, do_sample=False, eos_token_id=None
    )
    model = load_model(str(tmp_path))
    assert model.config.encoder.start == (2, FORCED)
    engine = Engine(model, PRESETS[preset](model.config).replace(batch_size=3, prefill_chunk=4))
    ours = engine.generate([list(source) for source in SOURCES], SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert theirs[:, :2].tolist() == [[2, FORCED]] * 3
    assert [list(completion.token_ids) for completion in ours] == theirs[:, 2:].tolist()


def test_the_reference_as_released_ignores_its_router(tmp_path):
    """When this fails the release has been repaired: then `intended` can go."""
    model = write(tmp_path, {})
    before = reference_logits(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts.expert_" in name and name.split(".expert_")[1][0] not in "01":
                weight.zero_()
    np.testing.assert_array_equal(reference_logits(model), before)


@pytest.mark.skipif("COMPARE" not in os.environ, reason="needs a folder written by another release")
def test_another_release():
    from specmoe_jax.checkpoints import load_model

    folder = pathlib.Path(os.environ["COMPARE"])
    print("transformers", json.loads((folder / "config.json").read_text())["transformers_version"])
    assert_near(np.asarray(load_model(str(folder)).logits(TARGETS, *padded())), np.load(folder / "logits.npy"))


if __name__ == "__main__":
    np.save(pathlib.Path(sys.argv[1]) / "logits.npy", reference_logits(write(sys.argv[1], {})))
