"""docs/examples: each script runs, on the tiny model, and shows what it says."""

import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.testing import byte_tokenizer, write_tiny

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "examples"
PROMPTS = ["abcabcabcabcab", "hello hello hello"]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_acceptance(model, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.png"
    found = example("acceptance").main(model, PROMPTS, experts=(1, 5), lengths=(1, 3), new_tokens=8, picture=picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert found[5] == pytest.approx([1, 3], rel=0.35)  # with all experts the draft is the target
    assert all(0 <= few <= every for few, every in zip(found[1], found[5], strict=True))


def test_draft_set_policy(model):
    found = example("draft_set_policy").main(model, PROMPTS, new_tokens=8)
    assert list(found) == ["hot_temporal", "hot_global", "accepted choices, fading by 0.5", "accepted choices, fading by 0.9"]
    assert all(tokens >= 1 and sent >= 0 for tokens, sent in found.values())


def test_routing_traces(model, tmp_path):
    file = str(tmp_path / "routing.npy")
    found = example("routing_traces").main(model, PROMPTS, new_tokens=8, file=file)
    assert np.load(file).shape[1:] == (model.config.num_moe_layers, model.config.num_experts)
    assert all(ratio >= 1 for policies in found.values() for name, ratio in policies.items() if name not in ("static", "belady"))


def test_custom_draft(model):
    assert example("custom_draft").main(model, PROMPTS, new_tokens=12, length=3) >= 1


def test_resumable_job(tmp_path):
    (tmp_path / "tiny").mkdir()
    write_tiny(tmp_path / "tiny")
    byte_tokenizer().backend.save(str(tmp_path / "tiny" / "tokenizer.json"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\nnonsense\n{"prompt": "b"}\n{"prompt": "c"}\n')
    job = {"batch_size": 2, "new_tokens": 4}
    files = sm.load_model(str(tmp_path / "tiny")), str(tmp_path / "p.jsonl"), str(tmp_path / "o.jsonl")
    main = example("resumable_job").main
    assert main(*files, **job, most=2) == (0, 2)  # an error record and an answer
    assert main(*files, **job) == (2, 2)
    assert main(*files, **job) == (4, 0)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1, 2, 3]


@pytest.mark.parametrize("path", sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "tasks.py"}), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert text.count("\n") <= 60 and f"python docs/examples/{path.name}" in text
    assert re.search(r"^def main\(", text, flags=re.M) and 'if __name__ == "__main__":' in text
