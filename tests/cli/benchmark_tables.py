"""What every table of scripts/benchmark.py holds, of both suites."""

import json

from specmoe_jax.cli.shown.benchmark_table import as_text


def check_table(rows: dict[str, dict]) -> None:
    """Figures are there, stamped, with ratios where there is a base; rows print and are JSON."""
    assert any(row["base"] for row in rows.values())
    for row in rows.values():
        assert "link_bytes_per_s" in row["synthetic"]
        assert row["decode_tokens_per_s"] > 0 and row["tokens_per_step"] >= 1
        assert (row["ratios"] is None) == (row["base"] is None)
    lines = as_text(rows).splitlines()
    assert max(map(len, lines)) <= 80 and all(any(line.startswith(name) for line in lines) for name in rows)
    json.dumps(rows)
