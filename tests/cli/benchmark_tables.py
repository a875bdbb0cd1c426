"""What every table of scripts/benchmark.py holds, of both suites."""

import json

from tests.cli.conftest import load_script

benchmark = load_script("benchmark")


def check_table(rows: dict[str, dict]) -> None:
    """Figures are there, stamped, with ratios where there is a base; rows print and are JSON."""
    assert any(row["base"] for row in rows.values())
    for row in rows.values():
        assert "link_bytes_per_s" in row["synthetic"]
        assert row["decode_tokens_per_s"] > 0 and row["tokens_per_step"] >= 1
        assert (row["ratios"] is None) == (row["base"] is None)
    assert benchmark.as_text(rows).count("\n") == len(rows) + 1
    json.dumps(rows)
