"""A family is added by one file and one line of the registry: read, planned, predicted, converted and run like the others."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import specmoe_jax as sm
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.models.families import registry
from specmoe_jax.models.model import random_model
from specmoe_jax.models.spec import random_tensor, spec_leaves
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import CheckpointError

FILE = '''
"""All that is new in one model: a third of each head rotated, experts chosen by biased sigmoids, a norm before each head."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config

ARCHITECTURE = "InventedMoeForCausalLM"
WRAPPERS = ("InventedForConditionalGeneration",)


def parse_config(raw):
    require(raw, "hidden_act", "silu")
    router = RouterConfig(
        num_experts=size(raw, "experts"), experts_per_token=size(raw, "top"), rule="sigmoid", choice_bias=True, renormalise=True
    )
    attention = grouped_attention(raw, default_theta=1e4, rotated=1 / 3)
    return model_config(
        raw, family="invented", attention=attention, router=router, expert_hidden=size(raw, "width"), default_eps=1e-5
    )


def weight_specs(config):
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config, layer, expert):
    return (naming.separate_layout(config.experts, f"model.layers.{layer}.moe.{expert}", "gate", "up", "down"),)


def canonical_name(name):
    return name.removeprefix("text.")


def _layer_specs(config, layer):
    return naming.attention_specs(
        config,
        layer,
        **naming.qk_norm_specs(config, layer, full=False),
        router=naming.router_spec(config, layer, "moe.gate"),
        choice_bias=naming.choice_bias_spec(config, layer, "moe"),
    )
'''
RAW = {
    "architectures": ["InventedMoeForCausalLM"], "hidden_act": "silu", "hidden_size": 36, "num_hidden_layers": 2, "head_dim": 12,
    "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 71, "max_position_embeddings": 96, "experts": 5, "top": 2,
    "width": 20, "eos_token_id": 0,
}  # fmt: skip
PROMPTS, PARAMS = [(5, 9, 3, 17, 64), (7, 6)], sm.SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """The one file and the one line."""
    (tmp_path / "invented_family.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.FAMILIES, "invented", importlib.import_module("invented_family"))
    yield
    sys.modules.pop("invented_family")


def test_it_runs_in_every_flow(invented):
    model = random_model(registry.parse_config(RAW))
    changes = {"resident": {}, "on_demand": {"kv_tier": "host"}, "specmoe": {"draft_length": 3, "draft_experts": 2}}
    changes["streaming"] = {"draft": "ngram", "draft_length": 2}
    for preset, changed in changes.items():
        plan = sm.PRESETS[preset](model.config).replace(batch_size=2, **changed)
        for prompt, done in zip(PROMPTS, sm.Engine(model, plan).generate(PROMPTS, PARAMS), strict=True):
            choices = np.asarray(model.logits([prompt + done.token_ids])[0]).argmax(-1)
            assert choices[len(prompt) - 1 : -1].tolist() == list(done.token_ids), preset


def test_it_is_read_and_converted(invented, tmp_path):
    config = registry.parse_config({"architectures": ["InventedForConditionalGeneration"], "text_config": RAW})
    model, family, folder = random_model(config), registry.family_of(config), tmp_path / "checkpoint"
    specs = spec_leaves(family.weight_specs(config))
    for layer in config.expert_layers:
        specs += [part.spec for e in range(config.num_experts) for part in family.expert_layouts(config, layer, e)[0]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    safetensors.numpy.save_file({f"text.{spec.name}": random_tensor(spec, 0) for spec in specs}, folder / "model.safetensors")
    for path in (folder, convert(str(folder), tmp_path / "mapped", to="specmoe")):
        loaded = sm.load_model(str(path))
        jax.tree.map(np.testing.assert_array_equal, (loaded.weights, loaded.experts), (model.weights, model.experts))


def test_it_is_predicted(invented):
    config = registry.parse_config(RAW)
    plan = sm.PRESETS["specmoe"](config).replace(draft_experts=2)
    assert predict(config, plan, machine("a30"), Workload(prompt_tokens=8, new_tokens=8, skew=0.1)).tokens_per_s > 0


def test_without_the_line_it_is_refused():
    with pytest.raises(
        CheckpointError, match=r"architectures is \['InventedMoeForCausalLM'\]; this version runs MixtralForCausalLM"
    ):
        registry.parse_config(RAW)
