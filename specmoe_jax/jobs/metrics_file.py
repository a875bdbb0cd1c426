"""Figures -> the text format of Prometheus (text/plain; version 0.0.4), for a node exporter's textfile collector."""

from collections.abc import Mapping

PREFIX = "specmoe_"
# Sums that only grow while a process lives; all other numbers are gauges.
COUNTERS = frozenset(
    """new_tokens steps decode_s draft_s verify_s prefill_s warm_up_s compile_s link_bytes draft_link_bytes prefetch_bytes
    prefetch_wasted_bytes activation_link_bytes disk_bytes dram_hits dram_misses expert_hits expert_misses prefill_link_bytes
    prefill_disk_bytes scored_tokens score_read_tokens score_s score_link_bytes score_disk_bytes compilations_after_warmup
    requests_done requests_failed wall_s""".split()
)


def text(figures: Mapping) -> str:
    """Numbers become samples; None, texts and nested settings are left out, a list of numbers gets positions from 1.

    What is emulated or synthetic is a label of `specmoe_info`, so that no dashboard shows such figures unmarked.

    >>> print(text({"steps": 3, "floor_s": None, "synthetic": ["link_bytes_per_s"]}), end="")
    # TYPE specmoe_steps_total counter
    specmoe_steps_total 3
    # TYPE specmoe_info gauge
    specmoe_info{preset="",synthetic="link_bytes_per_s"} 1
    """
    lines = []
    for name, value in figures.items():
        samples = _samples(value)
        if samples:
            kind = "counter" if name in COUNTERS else "gauge"
            full = PREFIX + name + ("_total" if kind == "counter" else "")
            lines += [f"# TYPE {full} {kind}", *(f"{full}{label} {number!r}" for label, number in samples)]
    preset = figures.get("plan", {}).get("preset", "")
    stamps = ",".join(figures.get("synthetic", ()))
    lines += [f"# TYPE {PREFIX}info gauge", f'{PREFIX}info{{preset="{_escaped(preset)}",synthetic="{_escaped(stamps)}"}} 1']
    return "\n".join(lines) + "\n"


def _samples(value) -> list[tuple[str, int | float]]:
    if _is_number(value):
        return [("", value)]
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [(f'{{position="{position}"}}', number) for position, number in enumerate(value, 1)]
    return []


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
