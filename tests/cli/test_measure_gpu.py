"""The measurements for a GPU run unattended on a CPU's sizes, and what was measured outlives a part that is ended."""

import json

import pytest

from specmoe_jax.benchmarks.gpu import parts, profile, record


def rows_of(folder, part=None):
    return [row for row in record.read(folder) if part in (None, row["part"])]


@pytest.mark.slow
def test_a_dry_run_of_the_systems_and_only_the_missing_parts_again(run_script, tmp_path):
    flags = [f"--output={tmp_path}", "--dry_run", "--host_gib=16"]
    done = run_script("measure_gpu.py", *flags, "--parts=streaming,nllb")
    assert done.code == 0, done.err
    assert [row for row in rows_of(tmp_path) if row["question"] == "failure"] == []
    ended = {row["part"]: row["ended"] for row in rows_of(tmp_path) if row["question"] == "part"}
    assert ended == {"streaming": "done", "nllb": "done"}
    streamed = {row["preset"]: row for row in rows_of(tmp_path, "streaming") if row["question"] == "preset"}
    assert list(streamed) == ["streaming", "specmoeoff"]
    for row in streamed.values():
        assert 0 < row["fraction_of_floor"] and "random_weights" in row["synthetic"] and row["init_compilations"] > 0
        assert row["predicted"]["tokens_per_s"] > 0 and row["inside_interval"] in (True, False)
    lanes = [row["lanes_s"] for row in rows_of(tmp_path, "streaming") if row["question"] == "step"]
    assert len(lanes) == 2 and all({"cpu attention", "link to accelerator", "accelerator"} <= set(lane) for lane in lanes)
    assert json.loads((tmp_path / "streaming_4_lanes.json").read_text())["traceEvents"]
    steps = [row for row in rows_of(tmp_path, "nllb") if row["question"] == "step"]
    assert [row["preset"] for row in steps] == ["on_demand", "specmoe", "caching"]
    assert all(row["dispatches"] > 0 and row["wall_s"] > 0 for row in steps)
    again = run_script("measure_gpu.py", *flags, "--parts=nllb")
    assert again.out == f"nllb: ended well in {tmp_path} already; --again measures it again\n"


@pytest.mark.slow
def test_a_dry_run_of_the_forms_of_the_ffn(run_script, tmp_path):
    assert run_script("measure_gpu.py", f"--output={tmp_path}", "--dry_run", "--parts=ffn,attention,link").code == 0
    forms = {row["form"]: row["difference"] for row in rows_of(tmp_path, "ffn") if row["question"] == "ffn"}
    assert len(forms) >= 5 and max(forms.values()) < 0.03  # bfloat16 products against ours
    assert {row["question"] for row in rows_of(tmp_path, "link")} >= {"to_device", "to_device_beside", "slot_write", "to_pinned"}


def test_a_part_that_is_ended_is_said_and_all_parts_together_have_a_limit(run_script, tmp_path):
    done = run_script("measure_gpu.py", f"--output={tmp_path}", "--dry_run", "--parts=link,ffn", "--minutes=0.001")
    assert done.code == 0
    assert done.out.splitlines() == [
        "link: time is over after 0 s; what it had is kept",
        "ffn: not started, --minutes=0.001 are over",
    ]
    assert [(row["part"], row["ended"]) for row in rows_of(tmp_path)] == [("link", "time is over"), ("ffn", "not started")]


def test_what_a_part_raises_is_a_row_and_the_next_question_is_asked():
    def broken():
        yield {"question": "one"}
        raise ValueError("no such copy")

    rows = [*record.asked("copies", broken), *record.asked("slots", lambda: iter([{"question": "two"}]))]
    assert [row["question"] for row in rows] == ["one", "failure", "two"]
    assert rows[1]["asked"] == "copies" and rows[1]["failed"].endswith("ValueError: no such copy\n")


def test_rows_before_an_unfinished_line_are_read(tmp_path):
    record.append(tmp_path, {"question": "one"})
    with open(tmp_path / record.ROWS, "a") as file:
        file.write('{"question": "tw')
    assert record.read(tmp_path) == [{"question": "one"}]


def test_later_parts_do_without_grouped_products_that_were_wrong():
    machine = {"part": "machine", "question": parts.GROUPED}
    assert not parts.grouped_failed([])  # not asked
    assert not parts.grouped_failed([machine | {"agrees": True}])
    assert parts.grouped_failed([machine | {"agrees": False}])
    assert parts.grouped_failed([{"part": "machine", "question": "failure", "asked": parts.GROUPED}])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--parts=nothing"], "no part nothing"),
        (["--run=3"], "--run=3; the runs are 1, 2"),
        (["--run=1", "--parts=link"], "--run and --parts both say what to measure"),
    ],
)
def test_wrong_usage(run_script, tmp_path, flags, message):
    done = run_script("measure_gpu.py", f"--output={tmp_path}", *flags)
    assert done.code == 2 and message in done.err


def test_the_limits_of_a_run_leave_time_of_six_minutes_for_the_installation():
    assert {run: sum(parts.PARTS[name].seconds for name in names) for run, names in parts.RUNS.items()} == {1: 330, 2: 330}


def test_figures_of_a_profiled_step():
    def span(name, ts, dur, pid=2, tid=7):
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid}

    events = [
        {"name": "process_name", "pid": 2, "args": {"name": "/device:GPU:0"}},
        {"name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream #13(MemcpyH2D)"}},
        span("MemcpyH2D", 0, 100),
        span("MemcpyH2D", 150, 100),
        span("gemm", 200, 200),
        span("PjitFunction(experts)", 0, 5, pid=1),
        span("PjitFunction(experts)", 9, 5, pid=1),
    ]
    found = profile.figures(events, wall_s=1e-3)
    assert found["dispatches_by_program"] == {"experts": 2}
    assert (found["copies"], found["copies_busy_s"], found["kernels_busy_s"]) == (2, 200e-6, 200e-6)
    assert found["longest_gaps_between_copies_s"] == [50e-6]
    assert found["idle_s"] == pytest.approx(1e-3 - 350e-6)
