"""Figures of recorded tables: what stands where. How they look is looked at, not tested."""

import pytest

from specmoe_jax.benchmarks import plots


def row(case, ratios=(2.0, 1.5, 3.0), base="on_demand"):
    known = None if ratios is None else {"decode_tokens_per_s": list(ratios), "link_bytes_per_token": list(ratios)}
    return {"case": case, "base": base if ratios else None, "ratios": known, "synthetic": ["link_bytes_per_s"]}


BATCHES = {f"{case} @ {batch}": row(case, ratios) for batch in (256, 1, 16) for case, ratios in
           (("on_demand", None), ("caching", (2, 1, 3)), ("specmoe", (4, 4, 5)))}  # fmt: skip


def test_batches_are_in_order_and_the_base_is_the_line():
    (chart,) = plots.charts("batches", BATCHES, "decode_tokens_per_s").values()
    assert chart.places == ("1", "16", "256") and chart.label == "batch size"
    assert list(chart.series) == ["caching", "specmoe"]
    assert chart.series["caching"] == dict.fromkeys(("256", "1", "16"), (2, 1, 3))


def test_a_sweep_is_over_numbers_and_holds_its_base():
    rows = {f"{n} @ batch 4": row(str(n), (n / 2, n / 2, n), base="2") for n in (6, 3)} | {"2 @ batch 4": row("2", None)}
    (chart,) = plots.charts("layer_buffers", rows, "decode_tokens_per_s").values()
    assert chart.places == (2, 3, 6) and chart.label == "layer buffers" and chart.series[""][2] == (1, 1, 1)
    rows = {f"{case} @ 4": row(case) for case in ("N = 2", "caching 2", "N = 8", "caching 8")}
    (chart,) = plots.charts("draft_experts", rows, "decode_tokens_per_s").values()
    assert chart.places == (2, 8) and list(chart.series) == ["N =", "caching"]


def test_places_have_their_units():
    rows = {f"specmoeoff @ {pinned} of 6 layers pinned": row("specmoeoff") for pinned in (0, 3)}
    (chart,) = plots.charts("device_memory", rows, "decode_tokens_per_s").values()
    assert chart.places == ("0", "3") and chart.label == "layers pinned, of 6"


def test_more_systems_than_colours_get_a_figure_for_each_batch():
    rows = {f"self, {n} experts, length {n} @ {batch}": row(f"self, {n} experts, length {n}") for n in range(9) for batch in (1, 8)}
    found = plots.charts("drafts", rows, "decode_tokens_per_s")
    assert list(found) == ["_1", "_8"] and all(len(chart.series[""]) == 9 for chart in found.values())


def test_a_chart_for_each_base():
    rows = {"a @ 1": row("a", base="x"), "b @ 1": row("b", base="y")}
    assert list(plots.charts("guard", rows, "decode_tokens_per_s")) == ["_over_x", "_over_y"]


def test_files_name_their_message_and_are_stamped(tmp_path):
    pytest.importorskip("matplotlib")
    steps = {"a @ 1": row("a", None), "b @ 1": row("b", base="a")}
    for known in steps.values():
        known.update(step_latency_s=0.3, link_s=0.2, compute_s=0.1)
    written = plots.save({"suite": "specmoe", "model": "tiny", "tables": {"batches": BATCHES, "breakdown": steps}}, tmp_path)
    assert [path.name for path in written] == [
        f"specmoe_tiny_{name}.svg"
        for name in ("batches_speed", "batches_bytes", "breakdown_speed", "breakdown_bytes", "breakdown_seconds")
    ]
    text = written[0].read_text()
    assert "SYNTHETIC: the link." in text and "times those of OnDemand" in text and "SpecMoE" in text
    assert "bound: the larger one" in written[-1].read_text()
