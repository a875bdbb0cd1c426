"""The table of docs/checkpoints.md: what becomes of the configs of published models, by config.json alone.

python tests/checkpoints/published_table.py writes it anew, from the folder that SPECMOE_REAL names (real_files.py).
"""

import json
import pathlib

from real_files import REAL

from specmoe_jax.checkpoints.published.quantisation import from_config, is_built
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.support.errors import CheckpointError

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"
HEADING = "| config.json of | what becomes of it |\n|---|---|\n"


def verdict(raw: dict) -> str:
    """runs, or the words of the refusal, without the list of what is built."""
    try:
        config = parse_config(raw)
        quantisation = from_config(raw)
    except CheckpointError as e:
        return f"refused: {str(e).removeprefix('config.json: ').partition('; this version runs')[0]}"
    if quantisation is not None and not is_built(quantisation, config):
        return f"{config.family}; explained, load refuses: the weights are quantised as {quantisation.words}"
    packed = f", experts kept in {quantisation.words}" if quantisation is not None else ""
    return f"runs: {config.family}{packed}"


def configs(folder: pathlib.Path) -> dict[str, dict]:
    """Name -> config.json, of files as ORG--NAME_config.json."""
    files = sorted((folder / "configs").glob("*_config.json"), key=lambda file: file.name.lower())
    return {file.name.removesuffix("_config.json").replace("--", "/", 1): json.loads(file.read_text()) for file in files}


def table(folder: pathlib.Path) -> str:
    return HEADING + "".join(f"| {name} | {verdict(raw).replace('|', ' ')} |\n" for name, raw in configs(folder).items())


def replaced(page: str, new: str) -> str:
    """The page with the table in the place of the one that it has."""
    before, _, rest = page.partition(HEADING)
    rows = rest.split("\n\n", 1)
    return before + new + ("\n" + rows[1] if len(rows) > 1 else "")


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), table(REAL)), encoding="utf-8")
