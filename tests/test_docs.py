"""The docs do what they say: their blocks run, their commands run, their links lead somewhere, their examples hold."""

import doctest
import importlib
import json
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest

import specmoe_jax
from specmoe_jax.cli.main import COMMANDS
from specmoe_jax.config.plan_fields import fields_of_a_plan
from specmoe_jax.models.families import registry as families

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def code_cells(notebook):
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_all(sources, name):
    """One after the other in one namespace, as a reader does."""
    namespace = {"__name__": name}
    for number, source in enumerate(sources):
        exec(compile(source, f"{name}, block {number}", "exec"), namespace)
    return namespace


@pytest.fixture
def known_families(monkeypatch):
    """An example adds a family; it is gone afterwards."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


WITH_CODE = ("docs/tutorial.md", "docs/planner.md", "docs/scoring.md", "docs/serving.md", "docs/structured.md", "docs/features.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", *WITH_CODE])
def test_python_blocks(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some write a file
    if page == "docs/structured.md":
        pytest.importorskip("llguidance")
    sources = blocks(page, "python")
    assert sources
    run_all(sources, page)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("docs/extending.md", "python"))))
def test_blocks_that_are_copied_stand_alone(number, known_families, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_all([blocks("docs/extending.md", "python")[number]], f"docs/extending.md, block {number}")


@pytest.mark.slow
def test_the_notebook(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    run_all(code_cells("docs/tour.ipynb"), "tour")
    assert len(shown) == 3
    plt.close("all")


@pytest.mark.slow
def test_commands_of_the_tutorial(tmp_path):
    """In an empty folder, with a prompts file as it describes one."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The sea", "id": "first"}\n{"prompt": ""}\n')
    lines = "".join(blocks("docs/tutorial.md", "sh")).splitlines()
    commands = [line for line in lines if line.startswith("python scripts/generate.py")]
    assert len(commands) == 2
    for command in commands:
        _, script, *flags = shlex.split(command)
        done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(record["finish_reason"] for record in records) == ["error", "length"]
    described = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs/formats.md").read_text(), flags=re.M)))
    assert {key for record in records for key in record} == set(described)


def test_flags_named_in_the_docs_exist():
    """Of the commands, by their sources and the table of a plan's fields: a renamed flag must not live on in a page."""
    defined = {spec.flag for spec in fields_of_a_plan().values()}
    for command in (ROOT / "specmoe_jax/cli").rglob("*.py"):
        defined |= set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", command.read_text()))
    for page in ("tutorial", "formats", "troubleshooting", "scoring", "structured", "adapters", "features"):
        named = set(re.findall(r"`--(\w+)", (ROOT / f"docs/{page}.md").read_text()))
        assert named <= defined, named - defined


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Of files in this repository and of headings in them; the web is not asked."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


MODULES = sorted(m.name for m in pkgutil.walk_packages(specmoe_jax.__path__, "specmoe_jax.") if not m.name.endswith("_cpu_ops"))
# When imported, and a name only once in a process.
DEFINE_FLAGS = {*COMMANDS.values(), *(name for name in MODULES if name.startswith("specmoe_jax.cli.flag_groups."))}
MODULES = [
    name for name in MODULES if name not in DEFINE_FLAGS and ".studies." not in name
]  # studies need peers that are not installed


@pytest.mark.slow
def test_doctests():
    """The examples in docstrings."""
    results = [doctest.testmod(importlib.import_module(name)) for name in MODULES]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 9
