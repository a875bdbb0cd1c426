"""Draws the figures of these pages anew from the JSON beside them: python docs/benchmarks/draw.py (needs matplotlib)."""

import json
import pathlib
import tempfile

from specmoe_jax.benchmarks import plots

FOLDER = pathlib.Path(__file__).parent


def main() -> None:
    """Every figure that a page shows; what else the JSON would give is left out."""
    pages = "".join(page.read_text(encoding="utf-8") for page in FOLDER.rglob("*.md"))
    for source in sorted(FOLDER.rglob("*.json")):
        document = json.loads(source.read_text(encoding="utf-8"))
        if "tables" not in document:
            continue
        with tempfile.TemporaryDirectory() as drawn:
            for path in plots.save(document, pathlib.Path(drawn)):
                # Several files are of one suite, model and table: a figure has the name of its file and of its table.
                name = f"{source.stem}_{path.stem.split(pathlib.Path(document['model']).name + '_', 1)[1]}.svg"
                if name in pages:
                    source.with_name(name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
