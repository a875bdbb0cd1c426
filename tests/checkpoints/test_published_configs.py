"""Configs as they are published: which run, and with which words the others are refused."""

import pytest
from published_table import PAGE, configs, table, verdict
from real_files import REAL
from test_stored_families import ALL

from specmoe_jax.config.presets import PRESETS
from specmoe_jax.models.families.registry import parse_config

SCOUT_ROPE = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
TEXT = {key: value for key, value in ALL["llama4"].items() if key not in ("architectures", "rope_parameters")}
# In the spelling of the published files: base classes, older names of keys, wrappers, quantised forms.
SPELLINGS = {
    "Llama-4-Scout": (
        {
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "torch_dtype": "bfloat16",
            "text_config": TEXT | {"rope_scaling": SCOUT_ROPE, "rope_theta": 5e5}, "vision_config": {"hidden_size": 8},
        },
        "runs: llama4",
    ),
    "the same by model_type": ({"model_type": "llama4", "text_config": ALL["llama4"]}, "runs: llama4"),
    "nllb-moe-54b": (
        ALL["nllb_moe"]
        | {
            "architectures": ["NllbMoeModel"], "num_hidden_layers": 4, "router_dtype": "float32", "router_bias": False,
            "expert_capacity": 64, "router_ignore_padding_tokens": False, "torch_dtype": "float32", "bos_token_id": 0,
        },
        "runs: nllb_moe",
    ),
    "rope_theta and rope_scaling null": (
        ALL["mixtral"] | {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None},
        "runs: mixtral",
    ),
    "Qwen3-FP8": (
        ALL["qwen3_moe"] | {"quantization_config": FP8},
        "runs: qwen3_moe, experts kept in FP8 in blocks of 128 x 128",
    ),
    "gpt-oss": (ALL["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}, "runs: gpt_oss, experts kept in MXFP4"),
    "MXFP4 of another family": (
        ALL["mixtral"] | {"quantization_config": {"quant_method": "mxfp4"}},
        "mixtral; explained, load refuses: the weights are quantised as MXFP4",
    ),
    "an unknown class": (
        ALL["mixtral"] | {"architectures": ["ZebraForCausalLM"]},
        "refused: architectures is ['ZebraForCausalLM']",
    ),
    "neither class nor model_type": ({"hidden_size": 8}, "refused: no architectures, and model_type is None"),
    "a dense model": ({"architectures": ["LlamaForCausalLM"]}, "refused: architectures is ['LlamaForCausalLM']"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_published_spellings(name):
    raw, words = SPELLINGS[name]
    assert verdict(raw) == words


@pytest.mark.parametrize("family", ALL)
def test_every_family_runs_in_its_tiny_form(family):
    assert verdict(ALL[family]) == f"runs: {family}"


needs_files = pytest.mark.skipif(REAL is None, reason="needs a folder of published configs: SPECMOE_REAL or ../shared/real")


@needs_files
def test_the_table_of_the_docs_is_this_versions():
    assert table(REAL) in PAGE.read_text(encoding="utf-8"), "python tests/checkpoints/published_table.py writes it anew"


@needs_files
def test_every_published_config_runs_or_is_refused_by_name():
    """And every preset can be made for those that run."""
    found = configs(REAL)
    assert len(found) >= 69
    for name, raw in found.items():
        said = verdict(raw)
        assert said.isprintable() and len(said) < 300, name
        if not said.startswith("refused"):
            config = parse_config(raw)
            for preset in PRESETS.values():
                preset(config)
    for name in ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "mistralai/Mixtral-8x7B-v0.1", "openai/gpt-oss-120b"):
        assert verdict(found[name]).startswith("runs"), name
