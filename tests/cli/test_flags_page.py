"""docs/reference/flags.md lists every command's flags; write it anew with `python tests/cli/test_flags_page.py`."""

import io
import multiprocessing
import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).parents[2] / "docs/reference/flags.md"
HEAD = """# Commands and flags

`specmoe COMMAND --flags`; `specmoe COMMAND --help` prints the same on a terminal. A true-or-false flag is `--name` or `--noname`.
Flags of models, of sampling, and those that set [fields of a plan](../plan.md) are listed once, at the end.
Generated from the commands.
"""
SHARED = {
    "specmoe_jax.cli.flag_groups.plan_flags": (
        "Flags of a plan",
        "They change the plan of `--preset` or `--plan`; units are in their names.",
    ),
    "specmoe_jax.cli.flag_groups.process_flags": (
        "Flags of several processes",
        "One job in several processes, on one or [several hosts](../guides/cluster.md#one-model-over-several-hosts).",
    ),
    "specmoe_jax.cli.flag_groups.engine_flags": (
        "Flags of the engine",
        "The model and the plan of commands that keep one engine for many requests.",
    ),
    "specmoe_jax.cli.flag_groups.sampling_flags": (
        "Flags of sampling",
        "Defaults of requests that do not say otherwise ([options](../scoring.md)).",
    ),
}


def table(flags) -> str:
    from specmoe_jax.support.cache_files import cache_folder

    lines = ["| flag | values | default | |", "|---|---|---|---|"]
    for flag in flags:
        default = "" if flag.default in (None, [], "") else f"`{flag.default}`".replace(str(cache_folder()), "~/.cache/specmoe_jax")
        said = re.sub(
            r"^<.*?>: |;\s+repeat this option to specify a list of values$", "", flag.help
        )  # absl's, shown as values here
        help_text = " ".join(said.split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `--{flag.name}` | {values(flag)} | {default} | {help_text} |")
    return "\n".join(lines) + "\n"


def values(flag) -> str:
    if choices := getattr(flag.parser, "enum_values", None):
        return ", ".join(f"`{choice}`" for choice in choices)
    names = {"bool": "true or false", "int": "whole number", "float": "number", "string": "text"}
    names |= {"multi string": "text, may be repeated", "multi int": "whole number, may be repeated"}
    return (names | {"comma separated list of strings": "list, with commas"})[flag.flag_type()]


def section(name: str) -> str:
    """One command; in a process of its own, since importing a command defines its flags."""
    from absl import flags

    from specmoe_jax.cli.main import load_command

    command = load_command(name)
    known = flags.FLAGS.get_key_flags_for_module(command.__name__)
    its_own = {command.__name__, f"specmoe_jax.cli.flag_groups.{name}_flags"} - {*SHARED}
    own = [flag for flag in known if flags.FLAGS.find_module_defining_flag(flag.name) in its_own]
    defining = {flags.FLAGS.find_module_defining_flag(flag.name) for flag in known}
    assert defining <= {*its_own, *SHARED}, f"{name} adopts flags of {defining}; name their module in SHARED"
    used = [module for module in SHARED if module in defining]
    links = [f"[{SHARED[module][0].lower()}](#{SHARED[module][0].lower().replace(' ', '-')})" for module in used]
    also = f"\nAlso {', '.join(links)}.\n" if links else ""
    return f"\n## {name}\n\n{command.__doc__.strip().splitlines()[0]}\n{also}" + (f"\n{table(own)}" if own else "")


def shared(module: str) -> str:
    import importlib

    from absl import flags

    importlib.import_module(module)
    title, text = SHARED[module]
    known = flags.FLAGS.get_key_flags_for_module(module)
    own = [flag for flag in known if flags.FLAGS.find_module_defining_flag(flag.name) == module]
    return f"\n## {title}\n\n{text}\n\n{table(own)}"


def page() -> str:
    """Forks for each command what is slow to import once."""
    import specmoe_jax.cli.common
    import specmoe_jax.engine  # noqa: F401
    from specmoe_jax.cli.main import COMMANDS

    text = io.StringIO(HEAD)
    text.seek(0, io.SEEK_END)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        text.writelines(pool.map(section, COMMANDS, chunksize=1))
        text.writelines(pool.map(shared, SHARED, chunksize=1))
    return text.getvalue()


def test_the_page_is_what_the_commands_say():
    """In a process without threads, which may fork."""
    written = subprocess.run([sys.executable, __file__, "--print"], capture_output=True, text=True, check=True, timeout=600).stdout
    assert PAGE.read_text(encoding="utf-8") == written, "flags have changed: python tests/cli/test_flags_page.py"


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[2]))
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")
