"""The benchmark's tables on tiny sizes: every table runs, its figures agree with each other, and all are stamped."""

import dataclasses
import itertools

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.benchmarks import ablation, plots, specmoe
from specmoe_jax.benchmarks.categories import BUNDLED, read_categories
from specmoe_jax.benchmarks.rounds import Case, Job, compare
from specmoe_jax.engine.requests.prepare import batch_shape_of, make_requests
from specmoe_jax.models.quantised import quantise
from specmoe_jax.models.synthetic import SHAPES, TOPIC, synthetic_model, synthetic_prompts
from specmoe_jax.support.statistics import gini
from specmoe_jax.testing import TINY
from tests.cli.benchmark_tables import check_table

PROMPTS = tuple((7 * i % 250, 3, i) for i in range(4))
LINK = 1e9


@pytest.fixture(scope="module")
def setting(model):
    return specmoe.Setting(
        model=model,
        link_bytes_per_s=LINK,
        acceptance=0.5,
        experts=2,
        length=2,
        batches=(1, 4),
        job=lambda batch: Job(prompts=PROMPTS[:batch], rounds=2, tokens=2),
        quick=True,
        categories={"novels": PROMPTS[:2], "code": PROMPTS[2:]},
    )


@pytest.mark.slow
@pytest.mark.parametrize("table", [name for name in specmoe.TABLES if name not in ("batches", "ablation")])
def test_every_table_runs_and_is_stamped(setting, table, tmp_path):
    rows = specmoe.TABLES[table](setting._replace(batches=(4,)))
    check_table(rows)


@pytest.mark.slow
def test_batches_and_growth(setting, tmp_path):
    rows = specmoe.with_growth(specmoe.batches(setting))
    assert rows["on_demand @ 1"]["bytes_growth"] == rows["specmoe @ 1"]["bytes_growth"] == 1
    on_demand = rows["on_demand @ 4"]
    assert on_demand["bytes_growth"] > 1 and on_demand["tokens_per_step"] == 1
    least, most = rows["specmoe @ 4"]["ratios"]["link_bytes_per_token"][1:]
    assert least <= rows["specmoe @ 4"]["link_bytes_per_token"] / on_demand["link_bytes_per_token"] <= most
    assert "oracle_prefetch" in rows["overlap @ 4"]["synthetic"] and "oracle_prefetch" not in on_demand["synthetic"]
    pytest.importorskip("matplotlib")
    plots.save({"suite": "specmoe", "model": "tiny", "tables": {"batches": rows}}, tmp_path)
    assert (tmp_path / "specmoe_tiny_batches_speed.svg").stat().st_size > 1000


@pytest.mark.slow
def test_kinds_of_text_are_measured_apart(setting):
    rows = specmoe.TABLES["categories"](setting)
    assert {row["category"] for row in rows.values()} == {"novels", "code"} and {row["batch"] for row in rows.values()} == {2}
    drafted = rows["novels: self"]
    assert drafted["accepted_1"] == drafted["acceptance_by_position"][0] and "accepted_3" not in drafted
    assert rows["code: on_demand"]["base"] is None and rows["code: merged"]["base"] == "on_demand"


@pytest.mark.slow
def test_the_ablation_is_at_equal_memory(setting):
    """All pools have the same slots, but that of on_demand, which has no use for them; nothing compiles while measuring."""
    rows = specmoe.TABLES["ablation"](setting._replace(batches=(2,)))
    check_table(rows)
    assert {row["case"] for row in rows.values()} >= {
        "cache, lfru",
        "+ union stop",
        "merged each 1",
        "retain by demand, union stop",
    }
    slots = {}
    for case in ablation.cases(setting, 2):
        shape = batch_shape_of(case.plan, make_requests(setting.model, PROMPTS[:2], None))
        account = sm.Engine(setting.model, case.plan)._resources.take(shape).account
        slots[case.name] = account.num_slots + account.merged_slots
    assert slots.pop("on_demand") < min(slots.values()) == max(slots.values())
    assert max(row["speed_over_cache"] for row in rows.values() if row["case"].startswith("cache")) == 1


def test_prompts_by_category(tmp_path):
    bundled = read_categories(BUNDLED)
    assert len(bundled) == 6 and {len(prompts) for prompts in bundled.values()} == {8}
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"category": "a", "turns": ["x", "y"]}\n\n{"category": "b", "prompt": "z"}\n{"category": "a", "prompt": "w"}\n'
    )
    assert read_categories(file) == {"a": ("x", "w"), "b": ("z",)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "x"}', "line 1 has no category"),
        ('{"category": "a"}', "neither"),
        ("\n", "no prompt"),
    ],
)
def test_a_bad_line_of_categories_is_named(tmp_path, text, named):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(sm.RequestError, match=named):
        read_categories(file)


def test_nobody_finishes_while_measuring(model):
    plan = sm.PRESETS["specmoe"](TINY).replace(draft_experts=2, draft_length=3, synthetic_acceptance=0.8)
    row = compare(model, [Case("specmoe", plan)], Job(prompts=PROMPTS, rounds=3, tokens=3))["specmoe"]
    assert row["new_tokens"] == pytest.approx(row["tokens_per_step"] * row["steps"] * len(PROMPTS))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "skew"), [("nllb_shaped", 0.6), ("qwen3_shaped", 0.4)])
def test_the_synthetic_model_is_as_skewed_as_asked_and_counts(shape, skew):
    config = dataclasses.replace(SHAPES[shape].config, num_layers=2, num_experts=32)
    model = synthetic_model(config, skew=skew)
    assert model.synthetic == ("synthetic_routing",)
    prompts = synthetic_prompts(config, 32, 17)
    engine = sm.Engine(model, sm.PRESETS["on_demand"](config).replace(batch_size=32))
    counts = np.zeros((2, 32))

    def count(info):
        for layer, ids in enumerate(info.verify.routing):
            counts[layer] += np.bincount(ids.ravel(), minlength=32)

    completions = engine.generate(prompts, sm.SamplingParams(max_new_tokens=16), on_step=count)
    assert [gini(row) for row in counts] == pytest.approx([skew, skew], abs=0.06)
    assert "synthetic_routing" in engine.stats()["synthetic"]
    for prompt, completion in zip(prompts, completions, strict=True):
        text = (*prompt, *completion.token_ids)
        assert all(b == (a + 1 if (a + 1) % TOPIC else a + 1 - TOPIC) for a, b in itertools.pairwise(text))


def test_a_case_of_another_form_of_the_weights_has_its_own_bytes(model):
    """`Case.model`: here the same experts in int8."""
    plan = sm.PRESETS["on_demand"](TINY)
    packed = Case("packed", plan.replace(expert_dtype="int8"), "plain", model=quantise(model, "int8"))
    rows = compare(model, [Case("plain", plan), packed], Job(prompts=PROMPTS, rounds=2, tokens=2))
    assert rows["packed"]["link_bytes_per_token"] < 0.5 * rows["plain"]["link_bytes_per_token"]
