"""scripts/generate.py: what it tells while it runs: metrics file, times of requests, progress, traces."""

import gzip
import json
import os

import pytest

JOB = ("--prompt=Call me", "--prompt=a", "--max_new_tokens=8", "--ignore_eos", "--batch_size=1", "--preset=specmoe")


def test_metrics_file_and_request_times(generate, checkpoint, tmp_path, monkeypatch):
    """The file is replaced in full, never opened for writing under its own name; its last state is that of the stats."""
    replaced, replace = [], os.replace

    def spy(source, target):
        replaced.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    monkeypatch.setattr("specmoe_jax.jobs.watch.METRICS_EVERY_S", 0.0)
    ran = generate(f"--model={checkpoint}", *JOB, "--output=o.jsonl", "--metrics_file=m.prom", "--stats=s.json")
    assert ran.code == 0, ran.err
    stats = json.loads((tmp_path / "s.json").read_text())
    lines = (tmp_path / "m.prom").read_text().splitlines()
    assert replaced.count("m.prom") == stats["steps"] + 2  # at the start, after each step, at the end
    for line in ("specmoe_new_tokens_total 16", f"specmoe_steps_total {stats['steps']}", "specmoe_requests 2"):
        assert line in lines
    assert "specmoe_requests_done_total 2" in lines and "specmoe_requests_failed_total 0" in lines
    assert 'specmoe_info{preset="specmoe",synthetic=""} 1' in lines
    assert sorted(request["id"] for request in stats["requests"]) == [0, 1]
    for request in stats["requests"]:
        assert request["new_tokens"] == 8
        assert 0 < request["first_token_s"] <= request["total_s"] < stats["wall_s"]
    assert not list(tmp_path.glob("*.partial"))


def test_refused_prompts_are_counted(generate, checkpoint, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
    flags = ("--prompts=p.jsonl", "--max_new_tokens=2", "--output=o.jsonl", "--metrics_file=m.prom")
    ran = generate(f"--model={checkpoint}", *flags)
    assert ran.code == 0 and "warning: 1 of 2 prompts have no answer" in ran.err
    lines = (tmp_path / "m.prom").read_text().splitlines()
    assert "specmoe_requests_failed_total 1" in lines and "specmoe_requests_done_total 1" in lines


@pytest.mark.parametrize("mode", ["log", "none", "auto"])
def test_progress_changes_no_output(generate, checkpoint, tmp_path, mode):
    ran = generate(f"--model={checkpoint}", *JOB, f"--progress={mode}", "--output=o.jsonl")
    assert ran.code == 0 and ran.out == "" and "\r" not in ran.err
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2


def test_a_trace_holds_the_stages(generate, checkpoint, tmp_path):
    assert generate(f"--model={checkpoint}", *JOB, "--trace=t").code == 0
    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"prefill", "draft", "verify", "commit"} <= names


@pytest.mark.parametrize(
    "flags",
    [
        ("--output=x", "--metrics_file=x"),
        ("--stats=x", "--metrics_file=x"),
        ("--progress=loud",),
        ("--preset=fast",),
        ("--restart",),
    ],
)
def test_refused(generate, checkpoint, tmp_path, flags):
    ran = generate(f"--model={checkpoint}", *JOB, *flags)
    assert ran.code in (1, 2) and ran.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_platform_that_cannot_be_had_is_one_line(generate, generate_script, checkpoint, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    ran = generate(f"--model={checkpoint}", *JOB)
    assert ran.code == 1 and "give JAX_PLATFORMS=cuda,cpu" in ran.err and ran.err.count("\n") == 1
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setattr(generate_script.common.jax, "devices", missing)
    ran = generate(f"--model={checkpoint}", *JOB)
    assert ran.code == 1 and "(Unable to initialize backend 'cuda')" in ran.err and ran.err.count("\n") == 1


def missing():
    raise RuntimeError("Unable to initialize\nbackend 'cuda'")


def test_policies_of_the_draft_set_are_flags(generate, checkpoint, tmp_path):
    """They change what stays and who stands in, never the text."""
    texts = set()
    for number, flags in enumerate([(), ("--draft_set=hot_global", "--retain"), ("--substitution=random",)]):
        ran = generate(f"--model={checkpoint}", *JOB, *flags, f"--output={number}.jsonl", f"--stats={number}.json")
        assert ran.code == 0, ran.err
        texts.add("".join(sorted((tmp_path / f"{number}.jsonl").read_text().splitlines(True))))
        plan = json.loads((tmp_path / f"{number}.json").read_text())["plan"]
        assert (plan["draft_set"], plan["retain"]) == (("hot_global", True) if number == 1 else (None, False))
    assert len(texts) == 1
