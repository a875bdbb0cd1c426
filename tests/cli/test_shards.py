"""generate --shard and merge_outputs: a job in parts gives the answers of the whole job, also where a part was killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"{'Call me Ishmael. '[: 3 + i % 12]}{i}" for i in range(7)]
LINES = [{"prompt": text} | ({"temperature": 0.9, "seed": 5} if i % 2 else {}) for i, text in enumerate(TEXTS)]
JOB = ("--prompts=p.jsonl", "--output=o.jsonl", "--max_new_tokens=6", "--ignore_eos", "--batch_size=2", "--preset=on_demand")


@pytest.fixture
def job(generate, checkpoint, tmp_path):
    """Runs a job of seven prompts, one of them not to be served: more flags -> Ran."""
    lines = [json.dumps(line) for line in LINES]
    lines.insert(4, "nonsense")
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return lambda *flags: generate(f"--model={checkpoint}", *JOB, *flags)


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_three_shards_are_the_whole_job(job, merge_outputs, tmp_path):
    """Greedy and seeded requests, each with the number that it has in the whole job; the merged file is the whole job's."""
    for number in (3, 1, 2):
        ran = job(f"--shard={number}/3")
        assert ran.code == 0, ran.err
    assert "warning: 1 of 3 prompts" in ran.err
    assert len(records(tmp_path / "o.2-of-3.jsonl")) == 3 and not (tmp_path / "o.jsonl").exists()
    merged = merge_outputs("--output=o.jsonl")
    assert (merged.code, merged.out) == (0, "8 answers: o.jsonl\n")
    ran = job()
    assert ran.code == 0 and "7 of 8 prompts were done before, 0 are left" in ran.err
    parts = records(tmp_path / "o.jsonl")
    assert [record["index"] for record in parts] == list(range(8))
    assert job("--restart").code == 0
    assert sorted(records(tmp_path / "o.jsonl"), key=lambda record: record["index"]) == parts
    assert len({record["text"] for record in parts}) > 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt=a", "--shard=1/2"), "--shard is of a job with --prompts and --output"),
        (("--prompts=p.jsonl", "--shard=1/2"), "--shard is of a job with --prompts and --output"),
        (("--prompts=p.jsonl", "--output=o", "--shard=0/2"), "give number/count from 1/n to n/n"),
        (("--prompts=p.jsonl", "--output=o", "--shard=1/9"), "give at most 8 shards"),
        (("--prompts=p.jsonl", "--output=p.jsonl", "--shard=1/2", "--stats=p.1-of-2.jsonl"), "--output and --stats are both"),
    ],
)
def test_refused(job, generate, checkpoint, tmp_path, flags, said):
    ran = generate(f"--model={checkpoint}", *flags, "--max_new_tokens=2")
    assert ran.code in (1, 2) and said in ran.err and ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.slow
def test_a_killed_shard_goes_on(job, checkpoint, tmp_path):
    """kill -9 when some answers are there: the same command does the others, and the file is that of a shard left alone."""
    command = [sys.executable, str(ROOT / "scripts/generate.py"), f"--model={checkpoint}", *JOB, "--shard=1/2", "--batch_size=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    path = tmp_path / "o.1-of-2.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not (path.exists() and path.read_bytes().count(b"\n")):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    before = path.read_bytes().count(b"\n")
    ran = job("--shard=1/2")
    assert ran.code == 0 and before, ran.err
    resumed = sorted(path.read_bytes().splitlines())
    assert job("--shard=1/2", "--restart").code == 0
    assert resumed == sorted(path.read_bytes().splitlines()) and len(resumed) == 4
