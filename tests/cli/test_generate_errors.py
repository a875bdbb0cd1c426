"""scripts/generate.py where a person erred: one line that says what to do, and nothing half-written."""

import json
import os
import re
import shutil

import pytest

import specmoe_jax as sm
from specmoe_jax.jobs import job as jobs
from specmoe_jax.testing import TINY
from tests.cli.generate_cases import prompt_flags

ERRORS = [
    (["--prompt="], "prompt 1 is empty; give at least one"),
    (["--prompt=" + "x" * 90], "prompt 1 has 90 tokens and the model's window is 90"),
    (["--prompts=none.txt"], "cannot read prompts from none.txt"),
    (["--model=nowhere"], "model nowhere: no such directory"),
    (["--plan=none.json"], "cannot read the plan none.json"),
    (["--plan=broken.json"], "the plan is not JSON"),
    (["--plan=binary.json"], "cannot read the plan binary.json"),
    (["--plan=unknown.json"], "a plan has no field nonsense"),
    (["--plan=good.json", "--preset=specmoe"], "both --plan and --preset are given; leave one out"),
    (["--max_new_tokens=0"], "max_new_tokens is 0"),
    (["--temperature=-1"], "temperature is -1.0"),
    (["--temperature=nan"], "temperature is nan"),
    (["--temperature=1", "--top_p=0"], "top_p is 0.0"),
    (["--temperature=1", "--seed=-1"], "seed is -1"),
    (["--stop="], "at least one character"),
    (["--repetition_penalty=0"], "repetition_penalty is 0.0"),
    (["--logit_bias=a:1"], "--logit_bias is 'a:1'; give ID:NUMBER"),
    (["--banned_tokens=1,x"], "--banned_tokens is '1,x'; give token ids"),
    (["--stop_token_ids=99999"], "stop_token_ids names token 99999"),
    (["--trace=good.json"], "cannot write good.json (it is no folder)"),
    (["--batch_size=0"], "--batch_size is 0"),
    (["--draft_experts=9"], "--draft_experts is 9; --draft=self needs 1 to 5"),
    (["--device_memory_gib=nan"], "--device_memory_gib is nan"),
    (["--device_memory_gib=inf"], "--device_memory_gib is inf"),
    (["--host_memory_gib=0.000001"], "host memory of 1.0 KiB is too small"),
    (["--link_gbps=0"], "--link_gbps is 0.0"),
    # without effect
    (["--top_k=5"], "top_k and top_p have no effect at temperature 0"),
    (["--top_p=0.5"], "top_k and top_p have no effect at temperature 0"),
    (["--min_p=0.1"], "min_p has no effect at temperature 0"),
    (["--seed=1"], "--seed has no effect at temperature 0"),
    (["--logprobs=3"], "--logprobs has no effect without --output"),
    (["--deterministic_sampling"], "--deterministic_sampling has no effect at temperature 0"),
    (["--preset=on_demand", "--draft_length=2"], "--draft_length=2 has no effect without a draft"),
    (["--preset=on_demand", "--draft_experts=2"], "--draft_experts=2 has no effect with --draft=none"),
    (["--draft=none", "--draft_length=2"], "--draft_length=2 has no effect without a draft"),
    (["--micro_batches=2"], "--micro_batches=2 has no effect"),
    (["--preset=resident", "--link_gbps=1"], "--link_gbps=1 has no effect where every expert is resident"),
    (["--expert_flow=resident"], "--draft=self has no effect with --expert_flow=resident"),
    # where nothing can be written
    (["--output=none/o.jsonl"], "cannot write none/o.jsonl (No such file or directory)"),
    (["--stats=none/s.json"], "cannot write none/s.json (No such file or directory)"),
    (["--output=folder"], "cannot write folder (it is no regular file)"),
    ([f"--output={os.devnull}"], f"cannot write {os.devnull} (it is no regular file)"),
    (["--output=good.json/o.jsonl"], "cannot write good.json/o.jsonl (Not a directory)"),
    (["--output=same", "--stats=same"], "--output and --stats are both same; give two files"),
    (["--output=same", "--stats=./same"], "--output and --stats are both ./same; give two files"),
    (["--output=o", "--stats=o.journal"], "the journal of --output and --stats are both o.journal; give two files"),
    (["--prompts=good.txt", "--output=folder/../good.txt", "--restart"], "--prompts and --output are both folder/../good.txt"),
    (["--output=same", "--stats=link"], "--output and --stats are both link; give two files"),
    (["--plan=good.json", "--metrics_file=good.json"], "--plan and --metrics_file are both good.json; give two files"),
    (["--output=/dev/stdout"], "--output is /dev/stdout; a job needs a file of its own"),
    (["--output=/dev/fd/2"], "--output is /dev/fd/2; a job needs a file of its own"),
    (["--prompt=caf\udce9"], "prompt 1 holds half of a surrogate pair, or bytes that are not UTF-8"),
    (["--max_new_tokens=" + "9" * 4000], "max_new_tokens is 9999"),
    (["--prompts=good.txt", "--seed=1"], "--seed has no effect at temperature 0"),
    (["--prompts=good.txt", "--top_p=0.5"], "--top_p has no effect at temperature 0"),
]


@pytest.fixture
def folder(tmp_path):
    """Files that the errors name."""
    plan = sm.PRESETS["specmoe"](TINY)
    (tmp_path / "good.json").write_text(plan.to_json())
    (tmp_path / "broken.json").write_text(plan.to_json()[:-9])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "unknown.json").write_text('{"preset": "specmoe", "nonsense": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.txt").write_text("a prompt\n")
    (tmp_path / "link").symlink_to(tmp_path / "same")
    return tmp_path


@pytest.mark.parametrize(("flags", "said"), ERRORS, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "")
def test_what_a_person_can_mend_is_one_line(generate, checkpoint, folder, monkeypatch, generate_script, flags, said):
    """Exit code 1, one line that says what was got, no file half-written, and no weight read before it."""
    monkeypatch.setattr(generate_script, "load_model", lambda *args, **kwargs: read_no_weights(*args, **kwargs))
    before = sorted(folder.iterdir())
    outputs = [] if any("--output" in flag for flag in flags) else ["--output=o.jsonl"]
    named = [] if any(flag.startswith(("--preset", "--plan")) for flag in flags) else ["--preset=specmoe"]
    ran = generate(f"--model={checkpoint}", "--prompt=a", *outputs, *named, *flags)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert said in ran.err
    assert sorted(folder.iterdir()) == before


def read_no_weights(*args, **kwargs):
    raise AssertionError("a weight was read before the error")


@pytest.mark.parametrize("preset", ["resident", "on_demand", "specmoe"])
@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
def test_the_named_memory_budget_works(generate, checkpoint, tmp_path, preset, kv_tier):
    """The first refusal names a budget that works for this very job, batch and prompts included."""
    job = (f"--model={checkpoint}", *prompt_flags(), "--max_new_tokens=60", f"--preset={preset}", f"--kv_tier={kv_tier}")
    ran = generate(*job, "--device_memory_gib=0.00001", "--output=o.jsonl")
    assert ran.code == 1 and ran.err.count("\n") == 1 and not list(tmp_path.iterdir())
    (gib,) = re.findall(r"the smallest that works is (--device_memory_gib=[0-9.]+)", ran.err)
    ran = generate(*job, gib, "--output=o.jsonl", "--stats=s.json")
    assert ran.code == 0, ran.err
    peak = json.loads((tmp_path / "s.json").read_text())["peak_accelerator_bytes"]
    assert peak <= float(gib.split("=")[1]) * 2**30


@pytest.mark.parametrize("preset", ["resident", "streaming"])
def test_a_memory_refusal_names_shortage_batch_and_the_nearest_plan(generate, checkpoint, preset):
    """What the plainest plan needs is too little for others; the flags that are named then run."""
    job = (f"--model={checkpoint}", *prompt_flags(), "--max_new_tokens=60")
    plain = generate(*job, "--preset=on_demand", "--device_memory_gib=0.00001")
    (gib,) = re.findall(r"the smallest that works is (--device_memory_gib=[0-9.]+)", plain.err)
    ran = generate(*job, f"--preset={preset}", gib)
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert re.search(r"device memory of .* short; .*(largest batch|longest context|not even the shortest)", ran.err)
    flags = ran.err.split("the nearest that fits: ")[1].split()
    ran = generate(*job, f"--preset={preset}", gib, *flags)
    assert ran.code == 0, ran.err


def broken(checkpoint, tmp_path, name, content):
    path = tmp_path / "broken"
    shutil.copytree(checkpoint, path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x08" * 40], ids=["missing", "empty", "object", "binary"])
def test_missing_and_broken_checkpoint_files(generate, checkpoint, tmp_path, name, content):
    path = broken(checkpoint, tmp_path, name, content)
    ran = generate(f"--model={path}", "--prompt=a", "--output=o.jsonl")
    assert ran.code == 1, ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--unknown=1"], "Unknown command line flag 'unknown'"),
        (["--kv_tier=disk"], "kv_tier"),
        (["--batch_size=many"], "batch_size"),
        (["text"], "unexpected argument 'text'"),
    ],
)
def test_wrong_usage(generate, flags, said):
    ran = generate("--prompt=a", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and said in ran.err


def test_no_prompt_is_wrong_usage(generate, checkpoint):
    ran = generate(f"--model={checkpoint}")
    assert ran.code == 2 and ran.err == "error: no prompt; give --prompt=TEXT or --prompts=FILE\n"


def test_a_failed_write_leaves_what_was_there(generate, checkpoint, tmp_path, monkeypatch):
    """The disk fills up while the figures are written: the old file stays whole, and nothing lies beside it."""
    (tmp_path / "s.json").write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ran = generate(f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--stats=s.json")
    assert ran.code == 1 and "error: cannot write s.json (No space left on device)" in ran.err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("s.json", "old")]


def test_flags_of_sampling_count_where_a_prompt_is_sampled(generate, checkpoint, tmp_path):
    """Each line may carry a temperature of its own; the other lines stay greedy."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "temperature": 0.9}\n{"prompt": "b"}\n')
    flags = ("--preset=specmoe", "--max_new_tokens=3", "--deterministic_sampling", "--seed=3", "--top_k=4")
    ran = generate(f"--model={checkpoint}", "--prompts=p.jsonl", "--output=o.jsonl", *flags)
    assert ran.code == 0, ran.err
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2


def test_figures_go_through_a_link_to_stdout(generate, checkpoint, tmp_path):
    """As root, /dev/stdout itself was replaced by a file."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    ran = generate(f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--preset=resident", "--stats=stdout")
    assert ran.code == 0 and (tmp_path / "stdout").is_symlink(), ran.err
    assert json.loads("{" + ran.out.partition("{")[2])["new_tokens"] == 2


def test_an_output_that_is_named_like_a_temporary_file(generate, checkpoint, tmp_path):
    flags = (f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--preset=resident")
    ran = generate(*flags, "--output=s.json.partial", "--stats=s.json")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "s.json.partial").read_text())["index"] == 0
    assert json.loads((tmp_path / "s.json").read_text())["new_tokens"] == 2


def test_an_output_that_goes_away_during_the_job(generate, checkpoint, tmp_path, monkeypatch):
    """It ended with exit code 0 and no answers."""
    record = jobs.record
    monkeypatch.setattr(jobs, "record", lambda *args: (tmp_path / "o.jsonl").unlink(missing_ok=True) or record(*args))
    ran = generate(f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--preset=resident", "--output=o.jsonl")
    assert ran.code == 1 and "error: o.jsonl was removed, replaced or unmounted while the job ran" in ran.err
