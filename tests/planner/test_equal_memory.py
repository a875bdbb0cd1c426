"""The benchmark's rows of all kinds of draft have the same accelerator memory, to an expert."""

import dataclasses
import types

import pytest

from specmoe_jax.benchmarks.kinds import cases, held
from specmoe_jax.benchmarks.rounds import Job
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.testing.families import RAW_CONFIGS

DEEP = {"num_nextn_predict_layers": 1, "num_hidden_layers": 12}
CONFIG = dataclasses.replace(parse_config(RAW_CONFIGS["glm4_moe"] | DEEP), max_positions=128)


def setting(experts: int) -> Setting:
    model = types.SimpleNamespace(config=CONFIG)
    job = Job(prompts=((1, 2, 3),), rounds=1, tokens=4)
    return Setting(model, 1e6, None, experts, 3, (1, 4), job=lambda batch: job, quick=False, heads={"mtp": None})


@pytest.mark.parametrize("batch", [1, 4])
def test_rows_differ_by_less_than_an_expert(batch):
    s = setting(CONFIG.num_experts - 1)
    rows = {case.name: held(s, case.plan) for case in cases(s, batch) if case.name != "on_demand"}
    assert list(rows) == ["self", "cache", "ngram", "merged", "mtp"]
    most = rows["self"].accelerator_bytes
    for name, row in rows.items():
        assert most - row.slot_bytes < row.accelerator_bytes <= most, name
    assert rows["mtp"].num_slots < rows["ngram"].num_slots  # the layer's memory is that of experts kept


def test_a_draft_without_room_is_left_out_with_a_word(caplog):
    names = [case.name for case in cases(setting(0), 1)]
    assert "mtp" not in names and "cache" in names
    assert "mtp @ 1 is left out: draft=mtp takes the memory of" in caplog.text
