"""The measurements for a GPU run unattended on a CPU's sizes, and what was measured outlives a part that is ended."""

import json

import pytest


@pytest.mark.slow
def test_a_dry_run_of_some_parts_and_only_the_missing_ones_again(run_script, tmp_path):
    flags = [f"--output={tmp_path}", "--dry_run"]
    parts = ("ffn", "overlap", "mixtral_streaming", "mixtral_planner")
    done = run_script("measure_gpu.py", *flags, f"--parts={','.join(parts)}")
    assert (done.code, done.out.splitlines()) == (0, [f"{part}: done" for part in parts]), done.err
    rows = {part: json.loads((tmp_path / f"{part}.json").read_text())["rows"] for part in parts}
    forms = {row["form"]: row["difference"] for row in rows["ffn"] if row.get("question") == "ffn"}
    assert len(forms) >= 6 and max(forms.values()) < 0.03  # bfloat16 products against ours
    streaming = rows["mixtral_streaming"][-1]
    assert streaming["complete"] and 0 < streaming["fraction_of_floor"] and "random_weights" in streaming["synthetic"]
    assert {"cpu attention", "link to accelerator", "accelerator"} <= set(streaming["lanes_s"])
    assert streaming["predicted"]["tokens_per_s"] > 0 and streaming["inside_interval"] in (True, False)
    planned = rows["mixtral_planner"][-1]
    assert planned["complete"] and planned["plan"]["batch_size"] >= 1 and "predicted" in planned and "tokens/s" in planned["chosen"]
    assert json.loads((tmp_path / "streaming_4_lanes.json").read_text())["traceEvents"]
    again = run_script("measure_gpu.py", *flags, "--parts=ffn")
    assert again.out == "ffn: has its file; --again measures it again\n"


@pytest.mark.slow
def test_a_part_that_is_ended_keeps_what_it_had(run_script, tmp_path):
    done = run_script("measure_gpu.py", f"--output={tmp_path}", "--dry_run", "--parts=settle", "--part_minutes=0.001")
    assert (done.code, done.out) == (0, "settle: ended after 0.001 minutes; what it had is kept\n")


def test_all_parts_together_have_a_limit(run_script, tmp_path):
    done = run_script("measure_gpu.py", f"--output={tmp_path}", "--dry_run", "--parts=settle,ffn", "--minutes=0.001")
    assert done.code == 0
    assert done.out.splitlines() == [
        "settle: ended after 0.001 minutes; what it had is kept",
        "ffn: not started, --minutes=0.001 are over",
    ]


def test_an_unknown_part_is_wrong_usage(run_script, tmp_path):
    done = run_script("measure_gpu.py", f"--output={tmp_path}", "--parts=nothing")
    assert done.code == 2 and "no part nothing" in done.err
