"""What a command says that lets the planner choose."""

import json

import pytest

from specmoe_jax.autotune import choose
from specmoe_jax.cli.flag_groups.chosen_plan import chosen_plan
from specmoe_jax.jobs.job import ModelHead
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.workload import Workload
from specmoe_jax.testing import TINY

KNOWN = choose.Knowledge(hardware=machine("4090"), workload=Workload(prompt_tokens=8, new_tokens=8))


@pytest.mark.parametrize(
    "stored, fixed, told",
    [
        ({"torch_dtype": "bfloat16"}, {}, True),
        ({"dtype": "torch.bfloat16"}, {}, True),
        ({"torch_dtype": "bfloat16"}, {"dtype": "float32"}, False),
        ({"torch_dtype": "float16"}, {}, False),
        ({"torch_dtype": "float32"}, {}, False),
        ({}, {}, False),
    ],
    ids=str,
)
def test_half_of_the_bytes(monkeypatch, tmp_path, capsys, stored, fixed, told):
    """Nobody learns elsewhere that a checkpoint in bfloat16 takes twice its size in the default dtype."""
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(choose, "know", lambda *_, **__: KNOWN)
    how = {"requests": 4, "model": str(tmp_path), "draft_head": None, "draft_model": None, "progress": "none"}
    plan = chosen_plan(ModelHead(TINY, None), tmp_path, choose.Job(8, 8), fixed=fixed, **how)
    said = capsys.readouterr().err
    assert plan.dtype == "float32" and "predicted, bound by the" in " ".join(said.split())
    assert ("--dtype=bfloat16" in said) is told
    assert max(map(len, said.splitlines())) <= 80
