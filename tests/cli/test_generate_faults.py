"""scripts/generate.py when something stops it: signals in each phase, memory and disks that end, prompts that are none."""

import json
import os
import resource
import signal
import threading
import weakref

import pytest

from specmoe_jax.checkpoints import experts, loader, tensors
from specmoe_jax.engine import session
from specmoe_jax.engine.flows import pooled
from specmoe_jax.jobs import job as jobs
from specmoe_jax.models.model import to_host
from specmoe_jax.speculate.hot_experts import affinity_cache
from specmoe_jax.support.errors import PinnedMemoryError

TEXTS = [f"{'Call me Ishmael. '[: 3 + i % 12]}{i}" for i in range(10)]
JOB = (
    "--prompts=p.jsonl",
    "--output=o.jsonl",
    "--max_new_tokens=6",
    "--ignore_eos",
    "--batch_size=3",
    "--draft_experts=2",
    "--preset=specmoe",
)
HALVES = (signal.SIGTERM, signal.SIGINT)

# phase -> what is called in it: module, name, and how many calls go well.
PHASES = {
    "load": (experts.HostBlocks, "__call__", 4),
    "affinity": (affinity_cache, "expert_distances", 1),
    "compile": (session, "warm_up", 0),
    "prefill": (pooled, "prefill", 1),
    "decode": (session, "step", 4),
    "between requests": (jobs, "record", 4),
}


@pytest.fixture
def job(generate, checkpoint, tmp_path, monkeypatch):
    """Runs a job of ten prompts: more flags -> Ran."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return lambda *flags: generate(f"--model={checkpoint}", *JOB, *flags)


def lines(path):
    return sorted(path.read_bytes().splitlines()) if path.exists() else []


def strike(monkeypatch, phase, action):
    """Calls `action` when the phase is on its way."""
    where, name, calls_before = PHASES[phase]
    real, calls = getattr(where, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == calls_before + 1:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, wrapped)
    return calls


@pytest.mark.parametrize("number", HALVES, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_each_phase_can_be_resumed(job, tmp_path, monkeypatch, phase, number):
    """Exit code 128 + signal, one line, whole lines only, and the same file in the end as without."""
    with monkeypatch.context() as patch:
        calls = strike(patch, phase, lambda: os.kill(os.getpid(), number))
        stopped = job()
    assert len(calls) > PHASES[phase][2], "the phase was never reached"
    assert stopped.code == 128 + number
    assert stopped.err.splitlines()[-1].startswith(f"error: stopped by {number.name}; the same command goes on")
    half = lines(tmp_path / "o.jsonl")
    assert len(half) < len(TEXTS) and all(json.loads(line)["finish_reason"] == "length" for line in half)
    assert not list(tmp_path.rglob("*.part*"))
    resumed = job("--stats=s.json")
    assert resumed.code == 0, resumed.err
    assert bool(half) == (f"{len(half)} of {len(TEXTS)} prompts were done before" in resumed.err)
    done = json.loads((tmp_path / "s.json").read_text())["new_tokens"]
    assert done == 6 * (len(TEXTS) - len(half))  # what was finished is not done again
    final = lines(tmp_path / "o.jsonl")
    assert job("--restart").code == 0
    assert set(half) <= set(final) == set(lines(tmp_path / "o.jsonl"))


def test_a_disk_that_fills(job, tmp_path):
    """A file size limit stands for the full disk (a real one, small, is filled by specmoe_jax/benchmarks/studies/full_disk.py)."""
    assert job().code == 0
    whole = lines(tmp_path / "o.jsonl")
    (tmp_path / "o.jsonl").unlink()
    (tmp_path / "o.jsonl.journal").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        ran = job()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.code == 1
    assert "error: cannot write o.jsonl (File too large)" in ran.err and "run the same command again" in ran.err
    half = lines(tmp_path / "o.jsonl")
    assert 0 < len(half) < len(TEXTS) and set(half) < set(whole)
    assert job().code == 0
    assert lines(tmp_path / "o.jsonl") == whole


@pytest.fixture
def little_pinned_memory(monkeypatch):
    """The system refuses pinned memory for the experts when 8 of the 15 have some; -> the bytes of these."""
    given, freed, lock = [], [], threading.Lock()

    def stingy(block, device=None):
        with lock:
            if len(given) - len(freed) >= 8:
                raise PinnedMemoryError("refused")
            given.append(block.nbytes)
        block = to_host(block, device)
        weakref.finalize(block, freed.append, 1)
        return block

    monkeypatch.setattr(experts, "to_host", stingy)
    return given


def test_refused_pinned_memory_falls_back_to_the_disk_tier(job, tmp_path, little_pinned_memory, monkeypatch):
    ran = job("--stats=s.json")
    assert ran.code == 0, ran.err
    assert ran.err.startswith("warning: ") and "the others stay on disk: expert_tier=disk, host_memory_bytes=" in ran.err
    plan = json.loads((tmp_path / "s.json").read_text())["plan"]
    assert plan["expert_tier"] == "disk"
    assert 0 < plan["host_memory_bytes"] <= 0.75 * sum(little_pinned_memory[:8])
    fallen = lines(tmp_path / "o.jsonl")
    monkeypatch.setattr(experts, "to_host", to_host)
    assert job("--restart").code == 0
    assert lines(tmp_path / "o.jsonl") == fallen


def test_no_pinned_memory_at_all_is_one_line(job, tmp_path, monkeypatch):
    def refuse(block, device=None):
        raise PinnedMemoryError("the system refused 1 bytes of pinned host memory")

    monkeypatch.setattr(experts, "to_host", refuse)
    ran = job()
    assert ran.code == 1 and ran.err == "error: the system refused 1 bytes of pinned host memory\n"


def test_ten_thousand_lines_that_are_no_prompts(generate, checkpoint, tmp_path):
    """Mixed with 100 good ones: 100 answers, 10,000 records that say why, and hardly any memory for them."""
    bad = [
        "{",
        "[]",
        "null",
        '{"prompt": 3}',
        '{"prompt": ""}',
        '{"prompt": "a", "top_k": -1}',
        '{"prompt": "a", "x": 1}',
        '"\\ud800"',
    ]
    good = [json.dumps({"prompt": TEXTS[i % 10], "id": f"good {i}"}) for i in range(100)]
    rows = [bad[i % len(bad)] if i % 101 else good[i // 101] for i in range(10_100)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    flags = (f"--model={checkpoint}", "--prompts=p.jsonl", "--output=o.jsonl", "--max_new_tokens=2", "--batch_size=50")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ran = generate(*flags, "--preset=on_demand")
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(10_100))
    answers = [record for record in records if record["finish_reason"] != "error"]
    assert {record["id"] for record in answers} == {f"good {i}" for i in range(100)}
    assert all(record["error"].startswith(("line ", "prompt ")) for record in records if record["finish_reason"] == "error")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_the_loader_says_how_much_it_got(checkpoint, little_pinned_memory):
    with pytest.raises(PinnedMemoryError) as refused:
        loader.load_model(str(checkpoint))
    got = refused.value.pinned_bytes / little_pinned_memory[0]
    assert 8 - tensors.READERS < got <= 8  # the readers' blocks under way are not counted
