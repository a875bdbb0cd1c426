"""Figures of the benchmark's tables as a paper prints them: one message each, systems as colours, ratios with their ranges."""

import pathlib
import re
from typing import Any, NamedTuple

MESSAGES = (
    ("decode_tokens_per_s", "speed", "tokens/s,\ntimes those of {base}"),
    ("link_bytes_per_token", "bytes", "expert bytes a token over the link,\ntimes those of {base}"),
)
NAMES = {
    "on_demand": "OnDemand",
    "overlap": "Overlap, an oracle",
    "caching": "Caching",
    "specmoe": "SpecMoE",
    "specmoe + prefetch": "SpecMoE with prefetch",
    "specmoe, all of ours": "SpecMoE with prefetch, retained experts, guard",
    "streaming": "Streaming",
    "specmoeoff": "SpecMoEOff",
    "N =": "SpecMoE",
}
PLACES = {
    "": "batch size",
    "batch": "batch size",
    "prompt": "tokens of a prompt",
    "output": "new tokens of a request",
    "of the cache": "host memory for the KV cache, share of what the largest batch fills",
}
SWEEPS = {
    "draft_experts": "experts of a layer that stay",
    "draft_lengths": "drafted tokens of a step",
    "layer_buffers": "layer buffers",
    "micro_batches": "micro-batches",
    "draft_memory": "accelerator memory of the draft's cache, share of what the job fills",
}
BASES = {"layer_buffers": "{} layer buffers", "micro_batches": "{} micro-batch", "draft_memory": "the whole cache"}
SYNTHETIC = {
    "link_bytes_per_s": "the link",
    "synthetic_acceptance": "acceptance",
    "synthetic_routing": "routing",
    "oracle_prefetch": "the oracle",
}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")  # distinct for colour-blind readers too
MOST_COLOURS = len(COLOURS)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specmoe",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Chart(NamedTuple):
    """series: {name: {place: (median, least, most)}}; places in order; label: what a place is, None where they are names."""

    places: tuple
    label: str | None
    series: dict[str, dict]


def save(document: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes folder/<suite>_<model>_<table>_<message>.svg and names them. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    model, written = pathlib.Path(document["model"]).name, []
    with plt.rc_context(dict[Any, Any](STYLE)):
        for table, rows in document["tables"].items():
            for name, figure in _figures(table, rows):
                stamps = sorted({stamp for row in rows.values() for stamp in row["synthetic"]})
                figure.supxlabel(_footer(model, stamps), fontsize=7, x=0.01, ha="left")
                written.append(folder / f"{document['suite']}_{model}_{table}_{name}.svg")
                figure.savefig(written[-1], metadata={"Date": None})
                plt.close(figure)
    return written


def charts(table: str, rows: dict[str, dict], key: str) -> dict[str, Chart]:
    """Of the rows that have a base: a chart for each base and, where systems outnumber colours, for each place.

    The keys are what a file's name ends with, "" where there is one chart.
    """
    found = {}
    bases = list(dict.fromkeys(row["base"] for row in rows.values() if row["ratios"]))
    for base in bases:
        own = {name: row for name, row in rows.items() if row["ratios"] and row["base"] == base}
        suffix = f"_over_{_word(base)}" if len(bases) > 1 else ""
        places = sorted({_where(name) for name in own}, key=_natural)
        if len(places) > 1 and len({row["case"] for row in own.values()}) > MOST_COLOURS:
            for place in places:
                here = {name: row for name, row in own.items() if _where(name) == place}
                found[f"{suffix}_{_word(place)}"] = _names(here, key)
        elif len(places) > 1:
            found[suffix] = _over_places(own, places, key)
        elif all(re.search(r"[\d.]+$", row["case"]) for row in own.values()):
            found[suffix] = _sweep(table, own, key)
        else:
            found[suffix] = _names(own, key)
    return found


def _over_places(rows: dict[str, dict], places: list[str], key: str) -> Chart:
    parts = [re.fullmatch(r"(\D*?) ?([\d.]+) ?(.*)", place) for place in places]
    words = {" ".join(part.group(1, 3)).strip() for part in parts if part}
    if all(parts) and len(words) == 1:
        label = PLACES.get(word := words.pop(), re.sub(r"^of (\d+) (.*)$", r"\2, of \1", word))
        ticks = {place: part.group(2) for place, part in zip(places, parts, strict=True) if part}
    else:
        label, ticks = "", {place: place for place in places}
    series: dict[str, dict] = {}
    for name, row in rows.items():
        series.setdefault(row["case"], {})[ticks[_where(name)]] = tuple(row["ratios"][key])
    return Chart(places=tuple(ticks.values()), label=label, series=series)


def _sweep(table: str, rows: dict[str, dict], key: str) -> Chart:
    series: dict[str, dict] = {}
    for row in rows.values():
        name, number = re.findall(r"^(.*?) ?([\d.]+)$", row["case"])[0]
        known = series.setdefault(name, {})
        if re.fullmatch(r"[\d.]+", row["base"]):  # the base is a point of the sweep
            known.setdefault(float(row["base"]), (1.0, 1.0, 1.0))
        known[float(number)] = tuple(row["ratios"][key])
    places = tuple(sorted({place for known in series.values() for place in known}))
    return Chart(places=places, label=SWEEPS.get(table, table), series=series)


def _names(rows: dict[str, dict], key: str) -> Chart:
    return Chart(
        places=tuple(row["case"] for row in rows.values()),
        label=None,
        series={"": {row["case"]: tuple(row["ratios"][key]) for row in rows.values()}},
    )


def _figures(table: str, rows: dict[str, dict]):
    for key, message, words in MESSAGES:
        for suffix, chart in charts(table, rows, key).items():
            base = next(row["base"] for row in rows.values() if row["ratios"] and suffix.endswith((_word(row["base"]), "")))
            yield message + suffix, _draw(chart, words.format(base=BASES.get(table, "{}").format(shown(base))))
    if all("link_s" in row and "compute_s" in row for row in rows.values()):
        yield "seconds", _draw_iteration(rows)


def _draw(chart: Chart, message: str):
    """Bars over named places, lines over a sweep, and the base as the line at 1."""
    import matplotlib.pyplot as plt

    if chart.label is None:
        (ratios,) = chart.series.values()
        figure, axis = plt.subplots(figsize=(5.6, 0.9 + 0.28 * len(ratios)), layout="constrained")
        axis.barh([shown(name) for name in ratios], _medians(ratios), xerr=_errors(ratios), color=COLOURS[0], **_WHISKERS)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlabel(message)
        return figure
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    numeric, wide = not isinstance(chart.places[0], str), 0.8 / len(chart.series)
    for number, (name, ratios) in enumerate(chart.series.items()):
        look = {"color": COLOURS[number % MOST_COLOURS], "label": shown(name) or None}
        if numeric:
            axis.errorbar(list(ratios), _medians(ratios), yerr=_errors(ratios), marker="o", capsize=2, **look)
        else:
            x = [chart.places.index(place) + wide * (number + 0.5) - 0.4 for place in ratios]
            axis.bar(x, _medians(ratios), wide, yerr=_errors(ratios), **look, **_WHISKERS)
    if not numeric:
        axis.set_xticks(range(len(chart.places)), chart.places)
    elif all(place == int(place) for place in chart.places):
        axis.set_xticks([int(place) for place in chart.places])
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel=chart.label, ylabel=message, ylim=(0, None))
    if len(chart.series) > 1 or any(name in NAMES for name in chart.series):
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _draw_iteration(rows: dict[str, dict]):
    """What a step takes beside what the link and the arithmetic take alone; the bound, their larger one, is a mark and no bar."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 1.2 + 0.7 * len(rows)), layout="constrained")
    parts = (("step_latency_s", "the step, measured"), ("link_s", "link alone"), ("compute_s", "arithmetic alone"))
    for number, (key, name) in enumerate(parts):
        y = [place + 0.25 * (number - 1) for place in range(len(rows))]
        axis.barh(y, [row[key] for row in rows.values()], 0.25, color=COLOURS[number], label=name)
    for place, row in enumerate(rows.values()):
        bound = max(row["link_s"], row["compute_s"])
        axis.plot([bound, bound], [place - 0.42, place + 0.42], color="black", label=None if place else "bound: the larger one")
    axis.set_yticks(range(len(rows)), [shown(row["case"]) for row in rows.values()])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


_WHISKERS = {"ecolor": "black", "capsize": 2, "error_kw": {"linewidth": 0.8}}


def shown(case: str) -> str:
    """A system's name in a figure."""
    return NAMES.get(case, case)


def _footer(model: str, stamps: list[str]) -> str:
    told = f"Model: {model}. Median and range of interleaved rounds. "
    return told + ("SYNTHETIC: " + ", ".join(SYNTHETIC.get(stamp, stamp) for stamp in stamps) + "." if stamps else "")


def _medians(ratios: dict) -> list[float]:
    return [median for median, _, _ in ratios.values()]


def _errors(ratios: dict) -> list[list[float]]:
    return [[median - least for median, least, _ in ratios.values()], [most - median for median, _, most in ratios.values()]]


def _where(name: str) -> str:
    """What follows the case in a row's name: a batch, a length of prompts, ..."""
    return name.rpartition(" @ ")[2] if " @ " in name else ""


def _word(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _natural(text: str) -> tuple:
    return tuple(float(part) if re.fullmatch(r"[\d.]+", part) else part for part in re.split(r"([\d.]+)", text))
