"""A table of the benchmark for people, in 80 columns; the JSON beside it has every figure."""

import textwrap

from specmoe_jax.cli.shown.wrapped_text import WIDTH

COLUMNS = (
    ("tok/s", "decode_tokens_per_s", 1),
    ("job tok/s", "job_tokens_per_s", 1),
    ("step s", "step_latency_s", 3),
    ("tok/step", "tokens_per_step", 2),
    ("verified", "verified_per_step", 2),
    *((f"acc. {n}", f"accepted_{n}", 2) for n in (1, 2, 3, 4)),
    ("kB/tok", "link_bytes_per_token", 1),
    ("floor", "fraction_of_floor", 2),
    ("floor s", "floor_s", 2),
    ("wasted", "prefetch_wasted_share", 2),
    ("growth", "bytes_growth", 2),
    ("x caching", "speed_over_caching", 2),
    ("x cache", "speed_over_cache", 2),
    ("link s", "link_s", 3),
    ("compute s", "compute_s", 3),
    ("x floor", "iteration_over_floor", 2),
    ("x sum", "iteration_over_sum", 2),
    ("CPU rows", "draft_cpu_row_share", 2),
    ("moves", "draft_moves", 0),
    ("MiB acc.", "peak_accelerator_bytes", 0),
)


def as_text(rows: dict) -> str:
    """A table for people; "speed" and "bytes" are ratios to the row's base, median and range."""
    columns = [column for column in COLUMNS if any(row.get(column[1]) for row in rows.values())]
    figures = [
        [title, *(_cell(row.get(key), digits, _SCALES.get(title, 1)) for row in rows.values())] for title, key, digits in columns
    ]
    ratios = [[title, *(_range((row["ratios"] or {}).get(key)) for row in rows.values())] for title, key in _RATIOS]
    bases = ["base", *(row["base"] or "-" for row in rows.values())]
    blocks = folded(["", *rows], [*ratios, bases, *figures] if any(row["base"] for row in rows.values()) else figures)
    stamps = sorted({stamp for row in rows.values() for stamp in row["synthetic"]})
    return "\n".join([*blocks, textwrap.fill(f"SYNTHETIC: {', '.join(stamps) or 'nothing'}", WIDTH)])


def folded(names: list[str], columns: list[list[str]], most: int = WIDTH) -> list[str]:
    """The columns beside the names, in as many blocks as `most` characters a line need; an empty line between two."""
    first = max(map(len, names))
    lines, widths = [[f"{name:<{first}}" for name in names]], [max(map(len, column)) for column in columns]
    for column, width in zip(columns, widths, strict=True):
        if len(lines[-1][0]) + 2 + width > most and len(lines[-1][0]) > first:
            lines.append([f"{name:<{first}}" for name in names])
        lines[-1] = [f"{line}  {cell:>{width}}" for line, cell in zip(lines[-1], column, strict=True)]
    return [line for number, block in enumerate(lines) for line in ([""] if number else []) + block]


_SCALES = {"kB/tok": 1e-3, "MiB acc.": 2**-20}
_RATIOS = (("speed x base", "decode_tokens_per_s"), ("bytes x base", "link_bytes_per_token"))


def _cell(value: float | None, digits: int, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _range(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[0]:.2f} ({values[1]:.2f}-{values[2]:.2f})"
