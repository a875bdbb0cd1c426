"""scripts/generate.py: what it writes, and its exit codes."""

import json
import re

import pytest

import specmoe_jax as sm
from specmoe_jax.engine.requests.finish import safe_length
from specmoe_jax.testing import TINY
from tests.cli.generate_cases import PROMPTS, prompt_flags, records

FIGURES = """wall_s load_s compile_s prefill_s decode_s new_tokens steps tokens_per_step decode_tokens_per_s
acceptance_by_position link_bytes link_bytes_per_token expert_hits expert_misses draft_link_bytes peak_accelerator_bytes
peak_host_bytes floor_s fraction_of_floor binding_resource compilations_after_warmup synthetic plan""".split()
SMALL = ("--max_new_tokens=12", "--draft_length=3", "--draft_experts=3", "--ignore_eos", "--preset=specmoe")


@pytest.fixture(scope="module")
def expected(model):
    """What the resident plan gives for the same prompts."""
    params = sm.SamplingParams(max_new_tokens=12, ignore_eos=True)
    return sm.Engine(model, sm.PRESETS["resident"](TINY)).generate(PROMPTS, params)


# A process of its own.


def test_a_run_of_the_main_job(run_script, checkpoint, tmp_path, expected):
    output, stats = tmp_path / "out.jsonl", tmp_path / "stats.json"
    ran = run_script("generate.py", f"--model={checkpoint}", *prompt_flags(), *SMALL, f"--output={output}", f"--stats={stats}")
    assert ran.code == 0, ran.err
    assert ran.out == ""
    for record, prompt, want in zip(records(output), PROMPTS, expected, strict=True):
        assert set(record) >= {"id", "prompt", "text", "token_ids", "finish_reason", "num_prompt_tokens", "num_new_tokens"}
        assert (record["prompt"], record["text"], tuple(record["token_ids"])) == (prompt, want.text, want.token_ids)
        assert (record["finish_reason"], record["num_new_tokens"]) == ("length", 12)
        assert record["num_prompt_tokens"] == len(prompt.encode())
    figures = json.loads(stats.read_text())
    assert set(FIGURES) <= set(figures)
    assert figures["new_tokens"] == 12 * len(PROMPTS)
    assert figures["draft_link_bytes"] == 0 and figures["compilations_after_warmup"] == 0 and figures["synthetic"] == []
    assert figures["plan"]["preset"] == "specmoe" and figures["plan"]["draft_experts"] == 3
    assert len(figures["acceptance_by_position"]) == 3
    assert figures["wall_s"] > figures["load_s"] > 0
    for row in ("tokens per step", "accepted by position", "link, expert bytes/token", "accelerator / host peak"):
        assert row in ran.err
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_codes_of_a_process(run_script, checkpoint):
    ran = run_script("generate.py", f"--model={checkpoint}", "--prompt=")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "error: prompt 0 is empty; give at least one character\n"
    ran = run_script("generate.py", "--promt=a")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and "promt" in ran.err
    ran = run_script("generate.py", "--help")
    assert ran.code == 0
    for flag in ("--prompt", "--[no]stream", "--kv_tier", "--link_gbps", "--device_memory_gib", "Example:"):
        assert flag in ran.out


# In this process.


@pytest.mark.parametrize(
    "changes", [[], ["--preset=on_demand"], ["--preset=resident"], ["--preset=auto"], ["--kv_tier=host"]], ids=str
)
def test_every_plan_writes_the_same_texts(generate, checkpoint, tmp_path, expected, changes):
    settings = SMALL if not changes or "kv_tier" in changes[0] else ("--max_new_tokens=12", "--ignore_eos")
    ran = generate(f"--model={checkpoint}", *prompt_flags(), *settings, "--output=o.jsonl", *changes)
    assert ran.code == 0, ran.err
    assert [record["text"] for record in records(tmp_path / "o.jsonl")] == [want.text for want in expected]


def test_texts_to_stdout(generate, checkpoint, expected):
    ran = generate(f"--model={checkpoint}", *prompt_flags(PROMPTS[:2]), *SMALL)
    assert ran.code == 0, ran.err
    for want in expected[:2]:
        assert f"[{want.id}] {want.prompt}{want.text}\n" in ran.out


def test_stream_of_one_prompt_is_its_text(generate, checkpoint, expected):
    for want in expected:
        ran = generate(f"--model={checkpoint}", f"--prompt={want.prompt}", *SMALL, "--stream")
        assert (ran.code, ran.out) == (0, want.text + "\n")


def test_stream_with_a_stop_string(generate, checkpoint, tmp_path, expected):
    """Neither the stop string nor its beginning is shown, though tokens of it are committed in several steps."""
    for number, want in enumerate(expected[:3]):
        stop = want.text[4:6]
        flags = (f"--model={checkpoint}", f"--prompt={want.prompt}", *SMALL, f"--stop={stop}")
        ran = generate(*flags, "--stream", f"--output={number}.jsonl")
        (record,) = records(tmp_path / f"{number}.jsonl")
        assert record["finish_reason"] == "stop"
        assert record["text"] == want.text[: want.text.index(stop)]
        assert ran.out == record["text"] + "\n"


def test_stream_of_several_prompts_is_their_texts(generate, checkpoint, expected):
    ran = generate(f"--model={checkpoint}", *prompt_flags(), *SMALL, "--stream")
    texts = ["" for _ in PROMPTS]
    for line in ran.out.splitlines():
        number, piece = re.fullmatch(r"\[(\d)\] (.*)", line).groups()
        texts[int(number)] += eval(piece)
    assert texts == [want.text for want in expected]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [("abc", (), 3), ("abc", ("x",), 3), ("abc", ("cd",), 2), ("abc", ("bcd", "c!"), 1), ("aa", ("aaa",), 0), ("", ("a",), 0)],
)
def test_safe_length(text, stop, shown):
    assert safe_length(text, stop) == shown


def test_prompts_from_a_file(generate, checkpoint, tmp_path, expected):
    lines = [{"prompt": PROMPTS[0], "id": "first"}, {"prompt": PROMPTS[1], "max_new_tokens": 2}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = generate(f"--model={checkpoint}", "--prompts=p.jsonl", *SMALL, "--output=o.jsonl")
    assert ran.code == 0, ran.err
    first, second = records(tmp_path / "o.jsonl")
    assert (first["id"], first["text"]) == ("first", expected[0].text)
    assert (second["id"], tuple(second["token_ids"])) == (1, expected[1].token_ids[:2])


def test_a_plan_file_and_flags_over_it(generate, checkpoint, tmp_path, expected):
    plan = sm.PRESETS["specmoe"](TINY).replace(draft_length=2, draft_experts=2, dtype="bfloat16")
    (tmp_path / "plan.json").write_text(plan.to_json())
    flags = (f"--model={checkpoint}", *prompt_flags(), "--max_new_tokens=12", "--ignore_eos", "--output=o.jsonl", "--stats=s.json")
    ran = generate(*flags, "--plan=plan.json", "--dtype=float32", "--draft_experts=3")
    assert ran.code == 0, ran.err
    assert [record["text"] for record in records(tmp_path / "o.jsonl")] == [want.text for want in expected]
    done = json.loads((tmp_path / "s.json").read_text())["plan"]
    assert (done["draft_length"], done["draft_experts"], done["dtype"]) == (2, 3, "float32")


def test_an_emulated_link_is_stamped(generate, checkpoint, tmp_path):
    ran = generate(
        f"--model={checkpoint}", "--prompt=a", "--preset=specmoe", "--max_new_tokens=3", "--link_gbps=1", "--stats=s.json"
    )
    figures = json.loads((tmp_path / "s.json").read_text())
    assert figures["synthetic"] == ["link_bytes_per_s"] and "SYNTHETIC" in ran.err
    assert figures["floor_parts_s"]["link"] == pytest.approx(figures["link_bytes"] / 1e9)
    assert figures["decode_s"] >= figures["floor_s"]


@pytest.mark.parametrize(
    ("preset", "asked"), [("on_demand", {"deterministic_sampling": True}), ("specmoe", {"synthetic_acceptance": 0.5})]
)
def test_a_job_knows_how_its_plan_samples(generate, checkpoint, tmp_path, preset, asked):
    """A plan file may ask for what no flag says; going on without it is another job."""
    plan, (field,) = sm.PRESETS[preset](TINY), asked
    flags = (f"--model={checkpoint}", *prompt_flags(), "--max_new_tokens=3", "--temperature=1", "--output=o.jsonl")
    for name, changes in (("asks", asked), ("plain", {})):
        (tmp_path / f"{name}.json").write_text(plan.replace(**changes).to_json())
    assert generate(*flags, "--plan=asks.json").code == 0
    refused = generate(*flags, "--plan=plain.json")
    assert refused.code == 1
    assert f"begun with other {field}" in refused.err
