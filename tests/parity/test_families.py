"""Every family against transformers: random checkpoints of its own save_pretrained, float32 logits within 1e-4, the same argmax."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from specmoe_jax import PRESETS, Engine
from specmoe_jax.checkpoints import load_model
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.packing.parts import matrix_kind
from specmoe_jax.testing.families import RAW_CONFIGS, WITH_TOWERS

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
torch.set_num_threads(1)

TOLERANCE = 1e-4
# A unit in the last place of every weight moves the reference's own logits by up to 4e-4, others' by 5e-6: see
# test_recurrent_layers_differ_by_roundings.
RECURRENT_TOLERANCE = 1e-3
SHAPES = ((1, 1), (1, 33), (3, 12))
VARIANT_SHAPES = ((2, 33),)  # each shape compiles anew
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
STEP = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}  # Llama-4-Scout's: no blend
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
VARIANTS = (
    *((family, {}) for family in RAW_CONFIGS | WITH_TOWERS),
    ("mixtral", {"rope_parameters": LLAMA3}),
    ("llama4", {"rope_parameters": STEP}),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("qwen3_moe", {"rope_parameters": YARN, "norm_topk_prob": False}),
    ("qwen3_moe", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5}),
    ("qwen2_moe", {"tie_word_embeddings": True, "norm_topk_prob": True, "sliding_window": 50}),
    ("qwen2_moe", {"use_sliding_window": False}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("deepseek_v2", {"q_lora_rank": 14, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "tie_word_embeddings": True}),
    ("deepseek_v2", {"rope_parameters": RAW_CONFIGS["deepseek_v2"]["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 0}}),
    ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    (
        "deepseek_v3",
        {"rope_interleave": False, "norm_topk_prob": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    ("glm4_moe_lite", {"mlp_layer_types": None, "q_lora_rank": None, "tie_word_embeddings": True}),
    ("glm4_moe", {"use_qk_norm": False, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5}),
    ("glm4_moe", {"attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 0.34}, "norm_topk_prob": False}),
    ("minimax_m2", {"rotary_dim": 12, "tie_word_embeddings": True}),
    ("granite_moe", {"tie_word_embeddings": True, "logits_scaling": 6.0, "residual_multiplier": 0.22}),
    ("qwen3_next", {"layer_types": None, "norm_topk_prob": False, "tie_word_embeddings": True}),
    ("qwen3_5_moe", {"layer_types": None, "full_attention_interval": 2, "linear_num_value_heads": 2}),
    ("deepseek_v32", {"index_n_heads": 9, "index_head_dim": 20, "index_topk": 20, "indexer_rope_interleave": None}),
    ("glm_moe_dsa", {"indexer_types": ["full", "full", "shared", "shared"], "index_topk": 9}),
    ("glm_moe_dsa", {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ("mimo_v2_flash", {"attention_value_scale": None, "v_head_dim": 12, "mlp_layer_types": ["sparse"] * 4}),
    ("gpt_oss", {"sliding_window": 50, "tie_word_embeddings": True}),
    ("gpt_oss", {"layer_types": ["full_attention"] * 3, "swiglu_limit": 7.0}),
    ("llama4", {"no_rope_layers": [1, 1, 1, 1], "use_qk_norm": False, "tie_word_embeddings": True}),
    ("llama4", {"attention_chunk_size": 50, "attn_temperature_tuning": False, "moe_layers": [0, 1, 2, 3]}),
)
FUSED = (
    "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm4_moe", "minimax_m2",
    "granite_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v32", "glm_moe_dsa", "mimo_v2_flash",
)  # fmt: skip


def write(path, family: str, changes: dict, *, original: bool = True):
    """A random model of transformers, saved by transformers, large enough in weights that every part matters."""
    torch.manual_seed(0)
    raw = {key: value for key, value in ((RAW_CONFIGS | WITH_TOWERS)[family] | changes).items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(**raw, initializer_range=0.15)
    config.get_text_config().initializer_range = 0.15
    kind = transformers.AutoModelForImageTextToText if family in WITH_TOWERS else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:  # which start as ones, zeros or not at all
                ones = "norm" in name and bool((weight == 1).all())  # others are stored less 1
                weight.copy_(float(ones) + 0.3 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(path, save_original_format=original)
    return model


def tolerance(model) -> float:
    return RECURRENT_TOLERANCE if model.config.recurrent_layers else TOLERANCE


def assert_parity(model, reference, shapes=SHAPES) -> float:
    """The largest difference."""
    rng, worst = np.random.default_rng(0), 0.0
    for shape in shapes:
        token_ids = rng.integers(0, model.config.vocab_size, shape)
        with torch.no_grad():
            theirs = reference(torch.from_numpy(token_ids), use_cache=False).logits.numpy()
        ours = np.asarray(model.logits(token_ids))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance(model))
        np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
        worst = max(worst, float(np.abs(ours - theirs).max()))
    return worst


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_logits(family, changes, tmp_path, record_property):
    reference = write(tmp_path, family, changes)
    error = assert_parity(load_model(str(tmp_path)), reference, VARIANT_SHAPES if changes else SHAPES)
    record_property("largest_difference", error)
    print(f"{family}: largest difference of a logit {error:.1e}")


@pytest.mark.parametrize(("family", "taps"), [("qwen3_next", 2), ("qwen3_next", 4), ("qwen3_5_moe", 2)])
def test_recurrent_layers_differ_by_roundings(family, taps, tmp_path):
    """The difference is of the size by which the reference moves with the last places of its weights, whatever the convolution.

    That is 5e-5 to 4e-4, above the tolerance of the other families: queries and keys are divided by their small norms, and a
    state sums over all positions. Of 8,646 logits up to 38 of the reference itself move by more than 1e-4.
    """
    reference = write(tmp_path, family, {"linear_conv_kernel_dim": taps})
    token_ids, weights = np.random.default_rng(0).integers(0, 131, (2, 33)), list(reference.parameters())

    def their_logits() -> np.ndarray:
        with torch.no_grad():
            return reference(torch.from_numpy(token_ids), use_cache=False).logits.numpy()

    theirs, kept, moved = their_logits(), [weight.detach().clone() for weight in weights], []
    for seed in range(4):
        torch.manual_seed(seed)
        for weight, before in zip(weights, kept, strict=True):
            weight.data = before * (1 + torch.randint(-1, 2, before.shape) * 2.0**-23)
        moved.append(np.abs(their_logits() - theirs).max())
    assert np.abs(np.asarray(load_model(str(tmp_path)).logits(token_ids)) - theirs).max() <= 4 * max(moved)
    assert max(moved) < RECURRENT_TOLERANCE


CONTEXT = (5, 99, 3, 17, 64, 8, 2, 120, 44, 9, 31)
SCORED = ((CONTEXT, (7, 7, 3)), (CONTEXT, (7, 21, 3, 9, 88)), ((40,), (12, 3, 5, 77, 20, 6, 1, 55)), (CONTEXT * 2, (1, 100)))


@pytest.mark.parametrize("family", RAW_CONFIGS | WITH_TOWERS)
def test_scores(family, tmp_path):
    """Log-probabilities of continuations, two of one context; beside batch mates, chunk by chunk, experts on demand."""
    reference = write(tmp_path, family, {})
    model = load_model(str(tmp_path))
    engine = Engine(model, PRESETS["on_demand"](model.config).replace(batch_size=3, prefill_chunk=8))
    for (context, continuation), score in zip(SCORED, engine.score(SCORED), strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].float()
        places, tokens = len(context) - 1 + torch.arange(len(continuation)), torch.tensor(continuation)
        theirs = torch.log_softmax(logits, -1)[places, tokens].numpy()
        np.testing.assert_allclose(score.logprobs, theirs, rtol=0, atol=tolerance(model))
        assert score.is_greedy == bool((logits[places].argmax(-1) == tokens).all())


@pytest.mark.parametrize("family", FUSED)
def test_fused_names(family, tmp_path):
    reference = write(tmp_path, family, {}, original=False)
    assert any(name.endswith("gate_up_proj") for name in safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    assert_parity(load_model(str(tmp_path)), reference, VARIANT_SHAPES)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 2.0), (1.0, 4.0)])
def test_frequencies_of_a_step_and_of_a_blend(low, high):
    """Llama-4-Scout as published (older spelling of the keys), with factors that are equal and that are not."""
    scaling = {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    raw = {key: value for key, value in RAW_CONFIGS["llama4"].items() if key != "rope_parameters"}
    raw |= {"max_position_embeddings": 10485760, "rope_theta": 5e5, "head_dim": 128, "rope_scaling": scaling}
    rope = parse_config(raw).layers[0].attention.rope
    config = transformers.Llama4TextConfig(**{key: value for key, value in raw.items() if key != "architectures"})
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(rope.frequencies, theirs.numpy(), rtol=1e-6)
    if low == high:
        assert set(np.round(np.array(rope.frequencies) / rope.plain(5e5, 128).frequencies, 6)) == {1.0, 1 / 16}


def test_mxfp4_decodes_as_in_the_reference():
    """Random bytes through both decoders."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 6, 2, 16)).astype(np.uint8)
    scales = rng.integers(100, 150, (3, 6, 2)).astype(np.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    ours = matrix_kind("mxfp4").decode_matrix({"codes": blocks.reshape(18, 2, 16), "scales": scales.reshape(18, 2)}, 64, np)
    np.testing.assert_array_equal(ours.reshape(3, 6, 64).swapaxes(1, 2), theirs.numpy())


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8_decodes_as_in_the_reference(scale_dtype):
    """Every code under scales of four blocks."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(0)
    codes = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (256, 1)), axis=1).view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(1e-4, 1e-2, (2, 2)).astype(scale_dtype)
    stored = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(stored, torch.from_numpy(scales.astype(np.float32)), torch.float32)
    ours = matrix_kind("fp8:128x128").decode_matrix({"codes": codes, "scales": scales.astype(np.float32)}, 256, np)
    np.testing.assert_array_equal(ours, theirs.numpy())
