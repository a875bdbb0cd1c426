"""`specmoe demo`: two systems, one text, a table of two rows in 80 columns, whatever the model."""

import io
import re

import pytest

from specmoe_jax.cli.shown.wrapped_text import WIDTH, WrappedText
from tests.cli.conftest import in_process, load_script


@pytest.fixture(scope="module")
def demo_script():
    return load_script("demo")


@pytest.fixture
def demo(demo_script, capfd, monkeypatch, tmp_path):
    return in_process(demo_script, capfd, monkeypatch, tmp_path)


def test_one_text_twice_and_a_table_of_two_rows(demo, demo_script, checkpoint, monkeypatch):
    monkeypatch.setattr(demo_script, "TOKEN_S", 0.002)
    ran = demo(f"--model={checkpoint}", "--prompt=Call me", "--max_new_tokens=12")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[2] == f"loading {checkpoint} ..."[:80]
    texts = re.findall(r"never ran before\)\n((?:  .*\n)+)", ran.out)
    assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith("  Call me")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("on_demand ", "specmoe "))}
    assert list(rows) == ["on_demand", "specmoe"] and rows["on_demand"][1] == "1.00"
    assert float(rows["specmoe"][1]) >= 1 and rows["specmoe"][-1] == "MB"
    assert "the same 12 tokens" in ran.out and "SYNTHETIC" in ran.out and "compilations after warm-up" not in ran.out


def test_the_rest_is_behind_verbose_and_flags_are_checked(demo, demo_script, checkpoint, monkeypatch):
    ran = demo(f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--temperature=0", "--link_gbps=1", "--verbose")
    assert ran.code == 0 and ran.out.count("compilations after warm-up") == 2, ran.err
    assert demo("--max_new_tokens=0").code == 2
    assert demo("--model=nowhere").err.startswith("error: model nowhere: no such directory")


def test_texts_that_differ_are_an_error(demo, demo_script, checkpoint, monkeypatch):
    real = demo_script.run
    other = lambda model, name, link: real(model, name, link)._replace(token_ids=(len(name),))  # noqa: E731
    monkeypatch.setattr(demo_script, "run", other)
    ran = demo(f"--model={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--link_gbps=1")
    assert ran.code == 1 and "NOT the same" in ran.out and "the two texts differ" in ran.err


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_in_pieces_is_wrapped_as_it_comes(size):
    text, out = "word  and\n\nanother " * 20 + "end", io.StringIO()
    with WrappedText(out, indent="  ") as shown:
        for start in range(0, len(text), size):
            shown.write(text[start : start + size])
    lines = out.getvalue().splitlines()
    assert " ".join(out.getvalue().split()) == " ".join(text.split())
    assert max(map(len, lines)) <= WIDTH and all(line.startswith("  ") for line in lines if line)
    assert all(len(line) > WIDTH - 10 for line in lines[:-2])
