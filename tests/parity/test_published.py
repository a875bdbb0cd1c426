"""Published configs: they parse, their rotary frequencies and the account of their memory are the reference's."""

import json

import numpy as np
import pytest

from specmoe_jax import PRESETS
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import CheckpointError
from tests.checkpoints.real_files import REAL
from tests.parity.published_configs import PUBLISHED

REASON = "the reference implementation is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
FLOAT32 = ("e_score_correction_bias", ".A_log", ".dt_bias", ".linear_attn.norm.weight")
SAME_AS = {"kimi_k2": "deepseek_v3"}  # model types of published files that the reference reads under another name


def reference_config(raw: dict):
    """Of the text part."""
    text = raw.get("text_config", raw)
    text = {key: value for key, value in text.items() if key not in ("architectures", "model_type")} | {
        "model_type": SAME_AS.get(text["model_type"], text["model_type"])
    }
    return transformers.AutoConfig.for_model(**text)


def on_meta(raw: dict) -> dict[str, torch.Tensor]:
    """What is stored of the text part, by name: parameters, and the biases of the choice, which are buffers."""
    config = reference_config(raw)
    with torch.device("meta"):
        if config.model_type == "qwen3_vl_moe_text":
            outer = transformers.AutoConfig.for_model("qwen3_vl_moe", text_config=config.to_dict())
            model = transformers.AutoModelForImageTextToText.from_config(outer)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    stored = dict(model.named_parameters()) | buffers
    return {name: tensor for name, tensor in stored.items() if ".visual." not in name}


def counted_bytes(raw: dict) -> int:
    """Of all weights in bfloat16, by the account that `explain` shows."""
    config = parse_config(raw)
    plan = PRESETS["on_demand"](config).replace(dtype="bfloat16", batch_size=1)
    counted = account(config, plan, batch_rows=1, positions=64)
    return counted.weight_bytes + counted.host_expert_bytes


def built_bytes(raw: dict) -> int:
    """Of what the reference builds, in bfloat16 but for what is stored in float32."""
    theirs = on_meta(raw)
    exact = sum(t.numel() for key, t in theirs.items() if key.endswith(FLOAT32))
    return 2 * (sum(t.numel() for t in theirs.values()) + exact)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_account_is_the_references_size(name):
    raw, stated = PUBLISHED[name]
    ours = counted_bytes(raw)
    assert ours == built_bytes(raw)
    assert ours == pytest.approx(2 * stated, rel=0.02)


def published_files() -> dict[str, dict]:
    """Those that are read, one of each kind of model, without their quantisation."""
    found = {}
    for file in sorted((REAL / "configs").glob("*_config.json"), key=lambda file: file.name) if REAL else []:
        raw = json.loads(file.read_text()) | {"quantization_config": None}
        try:
            found.setdefault(parse_config(raw), (file.name.removesuffix("_config.json"), raw))
        except CheckpointError:  # tests/checkpoints/test_published_configs.py has the words
            continue
    return dict(found.values())


FILES = published_files()


@pytest.mark.parametrize("name", FILES)
def test_the_account_of_every_published_file_is_the_references_size(name):
    """Exactly; but gpt-oss, whose blocks have a border for their biases."""
    ours, theirs = counted_bytes(FILES[name]), built_bytes(FILES[name])
    assert ours == (pytest.approx(theirs, rel=4e-4) if "gpt-oss" in name else theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotary_frequencies(name):
    raw, _ = PUBLISHED[name]
    rope = next(layer.attention.rope for layer in parse_config(raw).layers if layer.attention.rope)
    config = reference_config(raw)
    parameters = config.rope_parameters.get("full_attention", config.rope_parameters)
    kind = parameters["rope_type"]
    if kind == "default":
        share = parameters.get("partial_rotary_factor", 1.0)
        dim = int((getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * share)
        theirs, scale = 1 / parameters["rope_theta"] ** (np.arange(0, dim, 2) / dim), 1.0
    else:
        theirs, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    np.testing.assert_allclose(rope.frequencies, np.asarray(theirs), rtol=1e-6)
    assert rope.scale == pytest.approx(scale)
