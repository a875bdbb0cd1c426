"""Bar charts of the benchmark's tables: one PNG per table, one panel per figure."""

import pathlib

PANELS = (
    ("decode_tokens_per_s", "tokens/s"),
    ("link_bytes_per_token", "link bytes per token"),
    ("tokens_per_step", "tokens per step"),
    ("step_latency_s", "seconds per step"),
)
SOME = (("job_tokens_per_s", "tokens/s, whole job"), ("link_s", "link, s"), ("compute_s", "compute, s"))  # where a table has them


def save(document: dict, folder: pathlib.Path) -> None:
    """Writes folder/<suite>_<model>_<table>.png. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in document["tables"].items():
        panels = [*PANELS, *(panel for panel in SOME if all(panel[0] in row for row in rows.values()))]
        figure, axes = plt.subplots(1, len(panels), figsize=(16, 1.2 + 0.3 * len(rows)), sharey=True)
        for axis, (key, title) in zip(axes, panels, strict=True):
            axis.barh(list(rows), [row[key] or 0 for row in rows.values()])
            axis.set_title(title)
        axes[0].invert_yaxis()
        stamps = sorted({stamp for row in rows.values() for stamp in row["synthetic"]})
        figure.suptitle(f"{document['model']}, {table}" + (f"; synthetic: {', '.join(stamps)}" if stamps else ""))
        figure.tight_layout()
        model = pathlib.Path(document["model"]).name
        figure.savefig(folder / f"{document['suite']}_{model}_{table}.png", dpi=56)  # 50 kB at most
        plt.close(figure)
