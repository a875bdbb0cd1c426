"""scripts/generate.py with an EAGLE head: chains and trees from flags, the same text, and refusals in one line."""

import json

import pytest

import specmoe_jax as sm
from specmoe_jax.testing import EAGLE_JSON, TINY, eagle_head
from specmoe_jax.training import eagle

PROMPTS = ("Call me Ishmael.", "a", "It was the best of times")
TREE = ("--draft_tree_top_k=3", "--draft_tree_tokens=6")


@pytest.fixture(scope="module")
def head(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    eagle.write_head(folder, EAGLE_JSON, eagle_head(model), eagle_head(model).weights)
    return folder


@pytest.mark.parametrize("options", [(), TREE], ids=["chain", "tree"])
def test_same_text_as_without_a_draft(generate, checkpoint, head, model, tmp_path, options):
    params = sm.SamplingParams(max_new_tokens=12, ignore_eos=True)
    want = sm.Engine(model, sm.PRESETS["resident"](TINY)).generate(PROMPTS, params)
    eagles = (
        "--preset=specmoe",  # whose draft it replaces
        "--draft=eagle",
        f"--draft_head={head}",
        "--draft_length=3",
        *options,
    )
    files = (f"--output={tmp_path / 'o.jsonl'}", f"--stats={tmp_path / 's.json'}")
    ran = generate(
        f"--model={checkpoint}",
        *(f"--prompt={prompt}" for prompt in PROMPTS),
        "--max_new_tokens=12",
        "--ignore_eos",
        *eagles,
        *files,
    )
    assert ran.code == 0, ran.err
    records = sorted(map(json.loads, open(tmp_path / "o.jsonl")), key=lambda record: record["index"])
    assert [record["token_ids"] for record in records] == [list(completion.token_ids) for completion in want]
    plan = json.loads((tmp_path / "s.json").read_text())["plan"]
    assert plan["draft"] == "eagle" and plan["draft_experts"] is None
    assert plan["draft_tree_tokens"] == (6 if options else None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--draft=eagle",), "--draft=eagle and --draft_head=DIR go together"),
        (("--draft=eagle", "--draft_head=no/such/head"), "no such directory"),
        (("--draft_head=HEAD",), "--draft=eagle and --draft_head=DIR go together"),
        (("--draft=eagle", "--draft_head=demo"), "another model"),
        (TREE, "--draft_tree_top_k=3 has no effect with --draft=self"),
        (("--draft=eagle", "--draft_head=HEAD", "--draft_tree_top_k=3"), "give both"),
    ],
)
def test_refused_in_one_line(generate, checkpoint, head, options, said):
    options = [option.replace("HEAD", str(head)) for option in options]
    ran = generate(f"--model={checkpoint}", "--preset=specmoe", "--prompt=a", "--max_new_tokens=2", *options)
    assert ran.code == 1 and said in ran.err and ran.err.count("\n") == 1
