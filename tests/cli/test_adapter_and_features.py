"""An adapter given as a flag, and hidden states written by the command."""

import json

import numpy as np
import pytest
import safetensors.numpy

from specmoe_jax.jobs.features import read_features
from specmoe_jax.testing import TINY
from tests.cli.conftest import in_process, load_script

HOW = ("--preset=resident", "--max_new_tokens=4", "--ignore_eos")


@pytest.fixture
def adapter(tmp_path):
    folder, module = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 40}))
    rng = np.random.default_rng(0)
    tensors = {"A": rng.standard_normal((2, 40), np.float32), "B": rng.standard_normal((48, 2), np.float32)}
    safetensors.numpy.save_file(
        {f"{module}.lora_{side}.weight": values for side, values in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_an_adapter_is_part_of_the_job(generate, checkpoint, adapter, tmp_path):
    command = (f"--model={checkpoint}", "--prompt=Call me", *HOW, "--output=out.jsonl")
    assert generate(*command, f"--adapter={adapter}").code == 0
    without = generate(*command)
    assert without.code == 1 and "was begun with other adapter" in without.err
    assert generate(*command, f"--adapter={adapter}").code == 0
    missing = generate(*command, "--adapter=nowhere")
    assert (missing.code, missing.out) == (1, "") and "no such directory; give one with adapter_config.json" in missing.err


def test_features_as_files(checkpoint, adapter, capfd, monkeypatch, tmp_path):
    features = in_process(load_script("features"), capfd, monkeypatch, tmp_path)
    (tmp_path / "texts.txt").write_text("Call me\nIshmael\n")
    command = (f"--model={checkpoint}", "--texts=texts.txt", "--layers=3,1", "--output=states", "--texts_per_shard=1")
    for _ in range(2):  # the second time nothing is left to do
        ran = features(*command)
        assert ran.code == 0, ran.err
    found = list(read_features(str(tmp_path / "states")))
    assert [one.hidden.shape for one in found] == [(2, 7, TINY.hidden_size)] * 2
    other = features(*command, f"--adapter={adapter}")
    assert other.code == 1 and "was begun with other model" in other.err
    assert "--layers is 'x'; give whole numbers" in features(*(flag.replace("3,1", "x") for flag in command)).err
