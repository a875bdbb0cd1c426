"""specmoe chat: turns that build on each other, commands in the talk, and Ctrl-C that ends an answer alone."""

import builtins
import json
import os
import shutil
import signal

import pytest

import specmoe_jax as sm
from specmoe_jax.testing import TINY
from tests.cli.conftest import in_process, load_script

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
FLAGS = ("--preset=specmoe", "--draft_experts=2", "--draft_length=2", "--max_new_tokens=6", "--ignore_eos", "--progress=none")


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("jinja2")
    return load_script("chat")


@pytest.fixture
def folder(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture
def chat(script, capfd, monkeypatch, tmp_path, folder):
    """Says lines to the command."""
    run = in_process(script, capfd, monkeypatch, tmp_path)

    def say(*lines, flags=FLAGS):
        left = iter(lines)

        def answer(_):
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", answer)
        return run(f"--model={folder}", *flags)

    return say


def test_turns_build_on_each_other(chat, model, tmp_path):
    ran = chat("hi", "and you", "/save talk.json", "/undo", "/nothing", "/new", "/undo", "/save new.json")
    assert ran.code == 0, ran.err
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in talk] == ["user", "assistant"] * 2
    engine = sm.Engine(model, sm.PRESETS["resident"](TINY))
    for turn in (1, 3):
        text = "".join(f"<{message['role']}>{message['content']}" for message in talk[:turn]) + ">"
        (want,) = engine.generate([text], sm.SamplingParams(max_new_tokens=6, ignore_eos=True))
        assert want.text.startswith(talk[turn]["content"][:2]) and talk[turn]["content"] in ran.out
    assert "/nothing is not known" in ran.err and "no turn to take back" in ran.err
    assert json.loads((tmp_path / "new.json").read_text()) == []


def test_what_cannot_be_said_is_told_and_the_talk_goes_on(chat):
    ran = chat("x" * 200, "hi", flags=(*FLAGS, "--system=be brief"))
    assert ran.code == 0 and "shorten" in ran.err and ran.out.strip()
    ran = chat("hi", flags=(*FLAGS, "--logprobs=2"))
    assert ran.code == 1 and "--logprobs has no effect" in ran.err


def test_ctrl_c_ends_the_answer_and_not_the_talk(script, folder):
    model = sm.load_model(str(folder))
    engine = sm.Engine(model, sm.PRESETS["resident"](model.config))
    params = sm.SamplingParams(max_new_tokens=40, ignore_eos=True)
    talk = script.Talk(engine, engine.service(), params, None)
    pieces = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert talk.say("hello", show) == "cancelled"
    assert signal.getsignal(signal.SIGINT) is before and len(pieces) < 40
    assert talk.messages[1] == {"role": "assistant", "content": "".join(pieces)}
    assert talk.say("go on", pieces.append) == "length" and len(talk.messages) == 4
