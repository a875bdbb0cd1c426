"""The console command: `specmoe COMMAND`, `python -m specmoe_jax COMMAND` and scripts/*.py are one thing."""

import importlib
import pathlib
import re
import signal
import subprocess
import sys
import tomllib

import pytest

import specmoe_jax
from specmoe_jax.cli import main, start
from specmoe_jax.cli.flag_groups.flag_names import with_flags

ROOT = pathlib.Path(__file__).parents[2]
HELP = "Generates text with a Mixture-of-Experts model whose experts stay in host memory."


def console(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["specmoe", *args])
    code, handlers = 0, {number: signal.getsignal(number) for number in start.STOPS}
    try:
        main.main()
    except SystemExit as e:
        code = e.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, *capsys.readouterr()


def test_help_has_a_line_for_every_command(capsys, monkeypatch):
    code, out, err = console(capsys, monkeypatch, "--help")
    assert max(map(len, out.splitlines())) <= 80 and all(f"{title}:\n" in out for title in main.GROUPS)
    lines = dict(re.findall(r"^  (\w+) +(\S.*)$", re.sub(r"\n {10,}", " ", out), flags=re.M))
    assert (code, err) == (0, "") and list(lines) == list(main.COMMANDS)
    assert lines["generate"] == HELP


def test_version(capsys, monkeypatch):
    code, out, _ = console(capsys, monkeypatch, "--version")
    assert (code, out) == (0, f"specmoe_jax {specmoe_jax.__version__}\n")
    assert re.match(r"\d+(\.\d+)*", specmoe_jax.__version__)


@pytest.mark.parametrize("args", [("train",), (), ("--prompt=x",)])
def test_an_unknown_command_is_wrong_usage_and_told_the_names(capsys, monkeypatch, args):
    code, out, err = console(capsys, monkeypatch, *args)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: no command") and all(name in err for name in main.COMMANDS)


WAYS = {
    "module": ["-m", "specmoe_jax", "generate"],
    "script": [ROOT / "scripts/generate.py"],
    "entry point": ["-c", "from specmoe_jax.cli.main import main; main()", "generate"],  # as the wheel's
}


@pytest.mark.slow
@pytest.mark.parametrize("start", WAYS.values(), ids=WAYS)
def test_the_three_ways_are_one(start):
    run = {"capture_output": True, "text": True, "timeout": 300}
    helped = subprocess.run([sys.executable, *start, "--help"], **run)
    assert helped.returncode == 0 and helped.stdout.startswith(HELP), helped.stderr
    assert "--prompt:" in helped.stdout and "--draft_length:" in helped.stdout
    assert "--export_dir" not in helped.stdout  # of another command
    wrong = subprocess.run([sys.executable, *start], **run)
    assert (wrong.returncode, wrong.stderr) == (2, "error: no prompt; give --prompt=TEXT or --prompts=FILE\n")


WITHOUT = """
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, {scripts!r})
runpy.run_path({scripts!r} + "/generate.py", run_name="__main__")
"""


@pytest.mark.parametrize("missing", ["jax", "specmoe_jax"])
def test_a_script_without_its_packages_says_so_in_one_line(missing):
    code = WITHOUT.format(missing=missing, scripts=str(ROOT / "scripts"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"has no package {missing}" in done.stderr and "pip install" in done.stderr


DEFINED = {"draft", "draft_length", "device_memory_gib", "link_gbps", "guard", "draft_model", "batch_size", "draft_experts"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("draft_length is 0; it must be", "--draft_length is 0; it must be"),
        ("draft=self has no effect with expert_flow=resident", "--draft=self has no effect with expert_flow=resident"),
        ("the smallest that works is device_memory_bytes=1073741825", "the smallest that works is --device_memory_gib=1.000001"),
        ("link_bytes_per_s=1000000000.0 has no effect", "--link_gbps=1 has no effect"),
        ("guard=True adapts the length; leave out guard", "--guard adapts the length; leave out guard"),
        ("draft=model and draft_model go together", "--draft=model and --draft_model=DIR go together"),
        ("draft_experts=(2, 1) has", "--draft_experts=(2, 1) has"),
        ("cannot read /a/batch_size=3/draft_length", "cannot read /a/batch_size=3/draft_length"),
        ("a draft and 'batch_size'", "a draft and 'batch_size'"),
        ("give batch_size=3.", "give --batch_size=3."),
    ],
)
def test_fields_become_the_flags_that_a_command_has(said, told):
    assert with_flags(said, DEFINED) == told


def test_the_project_names_the_command_and_ships_its_types():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["specmoe"].partition(":")
    assert getattr(importlib.import_module(module), name) is main.main
    assert (pathlib.Path(specmoe_jax.__file__).parent / "py.typed").exists()
