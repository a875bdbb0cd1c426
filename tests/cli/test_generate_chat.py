"""scripts/generate.py --chat, and the sampling that a checkpoint asks for."""

import json
import shutil

import pytest

import specmoe_jax as sm
from specmoe_jax.jobs.watch import JobWatch
from specmoe_jax.testing import EOS_ID, TINY

TEMPLATE = (
    "{% for m in messages %}{% if '!' in m.content %}{{ raise_exception('no shouting') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}>"
)
SMALL = ("--max_new_tokens=8", "--draft_length=3", "--draft_experts=3", "--ignore_eos", "--preset=specmoe")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """The tiny checkpoint with a chat template."""
    pytest.importorskip("jinja2")
    path = shutil.copytree(checkpoint, tmp_path / "model")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def records(path):
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["index"])


def test_the_template_decides_what_the_model_reads(generate, folder, model, tmp_path):
    ids = [*model.tokenizer.encode("<user>hello"), EOS_ID, *model.tokenizer.encode(">")]
    params = sm.SamplingParams(max_new_tokens=8, ignore_eos=True)
    (want,) = sm.Engine(model, sm.PRESETS["resident"](TINY)).generate([ids], params)
    ran = generate(f"--model={folder}", "--chat", "--prompt=hello", *SMALL)
    assert ran.code == 0, ran.err
    assert ran.out == f"[0] hello\n{want.text}\n\n"
    ran = generate(f"--model={folder}", "--chat", "--prompt=hello", *SMALL, "--output=o.jsonl")
    assert ran.code == 0, ran.err
    (record,) = records(tmp_path / "o.jsonl")
    assert (record["prompt"], record["text"], record["num_prompt_tokens"]) == ("hello", want.text, len(ids))
    ran = generate(f"--model={folder}", "--chat", "--prompt=hello", *SMALL, "--stream")
    assert (ran.code, ran.out) == (0, want.text + "\n")


def test_a_job_knows_whether_it_chats(generate, folder):
    flags = (f"--model={folder}", "--prompt=hello", *SMALL, "--output=o.jsonl")
    assert generate(*flags, "--chat").code == 0
    assert generate(*flags, "--chat").code == 0
    ran = generate(*flags)
    assert ran.code == 1 and ran.err.count("\n") == 1


def test_a_message_that_the_template_refuses(generate, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b!", "", "c")))
    ran = generate(f"--model={folder}", "--chat", "--prompts=p.jsonl", *SMALL, "--output=o.jsonl")
    assert ran.code == 0, ran.err
    found = records(tmp_path / "o.jsonl")
    assert [record["finish_reason"] for record in found] == ["length", "error", "error", "length"]
    assert "no shouting" in found[1]["error"] and "empty" in found[2]["error"]
    for flags in (["--prompt=b!"], ["--prompts=p.jsonl"], ["--prompt=b!", "--prompts=p.jsonl", "--output=n.jsonl"]):
        ran = generate(f"--model={folder}", "--chat", *flags, *SMALL)
        assert (ran.code, ran.out) == (1, "") and "no shouting" in ran.err and ran.err.count("\n") == 1


def test_chat_without_a_template(generate, checkpoint):
    ran = generate(f"--model={checkpoint}", "--chat", "--prompt=a")
    assert (ran.code, ran.out) == (1, "") and "no chat template" in ran.err and ran.err.count("\n") == 1


def test_conversations_of_a_file_need_no_flag(generate, folder, tmp_path):
    """A line with messages is a conversation, the others stay as they are; an OpenAI batch is answered in its form."""
    talk = {"messages": [{"role": "user", "content": "hello"}]}
    chat = {"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": talk}
    lines = [talk, {"prompt": "hello"}, chat]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # the second time there is nothing left to do
        ran = generate(f"--model={folder}", "--prompts=p.jsonl", *SMALL, "--output=o.jsonl")
        assert ran.code == 0, ran.err
    first, plain, answer = records(tmp_path / "o.jsonl")
    assert first["num_prompt_tokens"] > plain["num_prompt_tokens"] == 5
    assert answer["custom_id"] == "q" and answer["response"]["body"]["choices"][0]["message"]["content"] == first["text"]


@pytest.mark.parametrize(
    "flags, sampled",
    [
        ([], {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
        (["--temperature=0"], {"temperature": 0.0, "top_k": 0, "top_p": 1.0}),
        (["--temperature=2", "--top_k=0"], {"temperature": 2.0, "top_k": 0, "top_p": 0.9}),
        (["--top_p=1"], {"temperature": 0.7, "top_k": 20, "top_p": 1.0}),
    ],
    ids=str,
)
def test_sampling_is_the_models_wish_unless_a_flag_says_otherwise(generate, generate_script, folder, monkeypatch, flags, sampled):
    wishes = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    seen = []

    def only_look(engine, part):
        seen.extend(part.own)
        return JobWatch(engine, ())

    monkeypatch.setattr(generate_script, "generate", only_look)
    (folder.parent / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "temperature": 0}\n')
    ran = generate(f"--model={folder}", "--prompts=p.jsonl", *SMALL, *flags)
    assert ran.code == 0, ran.err
    first, second = (prompt.params for prompt in seen)
    assert {name: getattr(first, name) for name in sampled} == sampled
    assert (second.temperature, second.top_k, second.top_p) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("wish", "flag", "sampled"),
    [
        ({"top_p": 0}, "--top_p=0.5", {"top_p": 0.5}),
        ({"top_k": -7}, "--top_k=3", {"top_k": 3}),
        ({"temperature": -1}, "--temperature=0.5", {"temperature": 0.5}),
        ({"top_p": 0}, "--temperature=0", {"temperature": 0.0}),
        ({"top_k": -1}, "--top_p=0.5", {"top_k": 0, "top_p": 0.5}),  # the whole vocabulary, as in other programs
    ],
    ids=str,
)
def test_a_flag_replaces_a_wish_that_cannot_be(generate, generate_script, folder, monkeypatch, wish, flag, sampled):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | wish))
    seen = []
    monkeypatch.setattr(generate_script, "generate", lambda engine, part: seen.extend(part.own) or JobWatch(engine, ()))
    ran = generate(f"--model={folder}", "--prompt=a", *SMALL, flag)
    assert ran.code == 0, ran.err
    assert {name: getattr(seen[0].params, name) for name in sampled} == sampled


def test_every_token_of_the_list_ends_a_text(generate, folder, model, tmp_path):
    params = sm.SamplingParams(max_new_tokens=8, ignore_eos=True)
    (want,) = sm.Engine(model, sm.PRESETS["resident"](TINY)).generate(["hello"], params)
    ends = want.token_ids[3]
    first = want.token_ids.index(ends)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS_ID, int(ends)]}))
    ran = generate(f"--model={folder}", "--prompt=hello", *SMALL[:3], "--output=o.jsonl")
    assert ran.code == 0, ran.err
    (record,) = records(tmp_path / "o.jsonl")
    assert record["finish_reason"] == "stop" and record["token_ids"] == list(want.token_ids[: first + 1])
