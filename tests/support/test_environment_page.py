"""docs/reference/environment.md: every environment variable that the code reads is in its tables, and every one there is in the code."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/environment.md"
WITHOUT_A_PAGE = {"PYTHONPATH", "PATH", "COMPARE"}  # of processes that tests and studies start; a folder of one comparison


def sources() -> list[pathlib.Path]:
    return sorted([*(ROOT / "specmoe_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")])


def constants(trees) -> dict[str, str]:
    """NAME = "text" at the top of a module: variables that are read by a name."""
    assigned = [
        node for tree in trees for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    return {target.id: node.value.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def read(tree: ast.AST, known: dict[str, str]) -> set[str]:
    """The variables of os.environ[...], .get, .setdefault, os.getenv and `in os.environ`."""
    asked = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            asked.append(node.slice)
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            asked.append(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr == "getenv" or (is_environ(node.func.value) and node.func.attr in ("get", "setdefault", "pop")):
                asked.append(node.args[0])
    names = {node.value for node in asked if isinstance(node, ast.Constant)}
    return names | {known[node.id] for node in asked if isinstance(node, ast.Name) and node.id in known}


def test_the_page_has_every_variable_that_is_read():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    known = constants(trees.values())
    rooms = {path: tree for path, tree in trees.items() if "tests" not in path.relative_to(ROOT).parts[0]}
    found = {name for tree in rooms.values() for name in read(tree, known)}
    found |= {name for tree in trees.values() for name in read(tree, known) if name.startswith("SPECMOE_")}
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    assert {"SPECMOE_CPU_OPS", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"} <= found  # the search finds both kinds
    assert found - WITHOUT_A_PAGE <= named, found - WITHOUT_A_PAGE - named
    text = "".join(path.read_text(encoding="utf-8") for path in sources() if path != pathlib.Path(__file__))
    assert not {name for name in named if name not in text and not name.startswith("JAX_")}
