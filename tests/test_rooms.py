"""The rooms of the package import in one direction ; held by reading the sources, not by running them."""

import ast
import pathlib
import re

import pytest

import specmoe_jax
from specmoe_jax.cli.main import COMMANDS

PACKAGE = pathlib.Path(specmoe_jax.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"

# The rooms from the ground up; each may import every room before it, with the exceptions below.
ORDER = (
    "support", "config", "types", "ops", "kv_cache", "models", "checkpoints", "offload", "speculate", "planner", "engine",
    "autotune", "jobs", "evaluation", "serving", "benchmarks", "training", "testing", "cli",
)  # fmt: skip
# Rooms beside each other: neither imports the other. `offload` and `speculate` meet only in the engine.
APART = {
    "offload": {"speculate"},
    "jobs": {"autotune"},
    "evaluation": {"autotune"},
    "serving": {"autotune", "evaluation"},
    "planner": {"checkpoints"},
    "training": {"engine", "autotune", "jobs", "evaluation", "serving", "benchmarks", "offload"},
    "testing": {"offload", "speculate", "planner", "engine", "autotune", "jobs", "evaluation", "serving", "benchmarks", "training"},
}
MAY_IMPORT = {room: set(ORDER[:place]) - APART.get(room, set()) for place, room in enumerate(ORDER)}
MAY_IMPORT["speculate"].discard("offload")


def room_of(module: str) -> str:
    """specmoe_jax.engine.step -> engine."""
    return module.split(".")[1]


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> set[str]:
    """Names of all modules that a file imports, inside functions too; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ABOVE_THE_ROOMS = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
STUDIES = PACKAGE / "benchmarks" / "studies"  # programs that a person runs by hand
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path not in ABOVE_THE_ROOMS and STUDIES not in path.parents)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(module_of(path))
    allowed = MAY_IMPORT[room] | {room}
    for name in imports(path):
        if name.startswith("specmoe_jax."):
            assert room_of(name) in allowed, f"{room} imports {name}"
        assert name != "specmoe_jax", f"{room} imports the package as a whole"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_room_reads_flags(path):
    """A flag is read in cli only; the library takes frozen configurations."""
    if room_of(module_of(path)) == "cli":
        return
    assert not any(name.split(".")[0] == "absl" for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_prints_inside_the_library(path):
    """What a person reads is printed by cli."""
    if room_of(module_of(path)) == "cli":
        return
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_one_file_knows_the_compiled_module():
    knowing = [path for path in FILES if "_cpu_ops" in path.read_text()]
    assert [module_of(path) for path in knowing] == ["specmoe_jax.ops.cpu._ffi"]


def test_every_room_is_known():
    assert {room_of(module_of(path)) for path in FILES} <= set(MAY_IMPORT)
    assert "offload" not in MAY_IMPORT["speculate"] and "speculate" not in MAY_IMPORT["offload"]


def test_a_script_runs_a_command_and_nothing_else():
    names = []
    for path in SCRIPTS.glob("[!_]*.py"):
        docstring, *code = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr) and len(code) == 2, path.name
        assert imports(path) == {"_run.run"}
        names += re.findall(r"run\(\"(\w+)\"\)", ast.unparse(code[1]).replace("'", '"'))
    assert sorted(names) == sorted(COMMANDS)


def test_a_command_imports_no_other():
    for command in COMMANDS.values():
        path = PACKAGE.parent / f"{command.replace('.', '/')}.py"
        assert not imports(path) & (set(COMMANDS.values()) - {command})


def test_no_room_imports_a_study():
    for path in FILES:
        assert not any(name.startswith("specmoe_jax.benchmarks.studies.") for name in imports(path))
