"""docs/guides: every command runs as it stands, every flag that is named exists, every generated page is what its source says."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import specmoe_jax as sm
from specmoe_jax.config.plan_fields import fields_of_a_plan

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = {"xla_force_host_platform_device_count", "array", "dependency", "gres", "nodes", "ntasks", "requeue", "wrap"}
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


def shell_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def shell(tmp_path):
    """Runs a script in an empty folder, where `specmoe` and `python` are those of this environment."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in {"specmoe": f'exec {sys.executable} -m specmoe_jax "$@"', "python": f'exec {sys.executable} "$@"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=os.environ | paths,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if shell_blocks(page)], ids=lambda page: page.stem)
def test_commands_of_a_guide(page, shell):
    shell("\n".join(shell_blocks(page)))


def test_flags_named_in_the_guides_exist():
    """Of our own: in tables that translate, the other engine's stand in the first column."""
    defined = {spec.flag for spec in fields_of_a_plan().values()}
    for command in (ROOT / "specmoe_jax/cli").rglob("*.py"):
        defined |= set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", command.read_text()))
    for page in GUIDES:
        if page.stem.startswith("from_"):
            text = " ".join(line.split("|", 2)[2] for line in page.read_text().splitlines() if line.startswith("| "))
        else:
            text = page.read_text()
        named = set(re.findall(r"(?<![\w-])--(\w+)", text)) - {"model", "help", "version"} - OTHERS
        assert named <= defined, (page.name, named - defined)


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: specmoe_jax[\w.]*\.(\w+)$", (ROOT / "docs/reference/api.md").read_text(encoding="utf-8"), flags=re.M)
    errors = {"CheckpointError", "PlanError", "RequestError", "UserError"}  # on the page as the members of their module
    assert "errors" in named and set(sm.__all__) - errors - {"__version__", "speculate"} <= set(named)


def test_every_figure_file_is_named_on_a_page_beside_it():
    """Tables stand beside their JSON, figures beside their tables."""
    for page in (ROOT / "docs/benchmarks").glob("*/index.md"):
        text = page.read_text(encoding="utf-8")
        unnamed = [path.name for path in page.parent.iterdir() if path != page and f"]({path.name})" not in text]
        assert not unnamed, (page.parent.name, unnamed)


def test_the_notebook_is_stored_as_it_was_run():
    cells = [cell for cell in json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert not [output for output in shown if output["output_type"] == "error" or output.get("name") == "stderr"]
