"""Draws the pictures of the concepts page: python docs/concepts/draw.py (needs matplotlib). Shapes, not measurements."""

import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = pathlib.Path(__file__).parent
HOT, FETCHED, FREE, HOST, INK = "#e69f00", "#56b4e9", "#ffffff", "#dddddd", "#222222"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "concepts", "font.family": "sans-serif", "font.size": 10, "text.color": INK}


def canvas(width: float, height: float):
    """A figure in whose axis one unit is as long in both directions."""
    figure, axis = plt.subplots(figsize=(0.45 * width, 0.45 * height), layout="constrained")
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return figure, axis


def box(axis, x: float, y: float, text: str = "", *, color: str = HOST, width: float = 1.0, height: float = 1.0, hatch: str = ""):
    axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=1, hatch=hatch))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def arrow(axis, start, end, *, color: str = INK, curve: float = 0.0):
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, connectionstyle=f"arc3,rad={curve}")
    )


def slots():
    figure, axis = canvas(18, 6.4)
    axis.text(2.5, 6, "host memory: every expert", ha="center")
    for layer in range(4):
        axis.text(-0.1, 4.5 - 1.2 * layer, f"layer {layer}", ha="right", va="center")
        for expert in range(5):
            box(axis, expert, 4 - 1.2 * layer, f"{layer}.{expert}")
    arrow(axis, (5.4, 2.6), (8.2, 2.6))
    axis.text(6.8, 2.9, "link", ha="center")
    axis.text(12.5, 6, "accelerator: one pool of slots", ha="center")
    held = [("0.1", HOT), ("0.4", HOT), ("1.2", HOT), ("1.3", HOT), ("2.0", HOT), ("2.4", HOT), ("3.1", HOT), ("3.3", HOT)]
    held += [("1.0", FETCHED), ("1.4", FETCHED), ("", FREE), ("", FREE)]
    for number, (text, color) in enumerate(held):
        box(axis, 9 + 1.2 * (number % 6), 3.2 - 1.4 * (number // 6), text, color=color)
    for x, text, color in ((9, "stays and drafts", HOT), (12.4, "fetched for this pass", FETCHED), (16.1, "free", FREE)):
        box(axis, x - 0.5 + 0.3, 0.2, "", color=color, width=0.4, height=0.4)
        axis.text(x + 0.4, 0.4, text, va="center", fontsize=9)
    axis.set_xlim(-1.6, 18)
    return figure


def waves():
    figure, axis = canvas(16, 5)
    for y, text in ((3.4, "link"), (1.4, "accelerator")):
        axis.text(-0.2, y + 0.5, text, ha="right", va="center")
    missing = iter("ABCDE")
    for wave, (start, count) in enumerate(((0, 2), (5, 2), (10, 1))):
        for place in range(count):
            box(axis, start + 1.5 * place, 3.4, next(missing), color=FETCHED, width=1.5)
        width = 1.0 * count
        box(axis, start + 1.5 * count + 0.1, 1.4, f"wave {wave + 1}", color=HOT, width=max(width, 1.6))
        arrow(axis, (start + 1.5 * count - 0.3, 3.3), (start + 1.5 * count + 0.4, 2.5))
    arrow(axis, (0, 0.7), (14.5, 0.7))
    axis.text(14.6, 0.7, "time", va="center")
    axis.text(7, 4.75, "five experts of a layer are missing, two slots are free", ha="center")
    axis.set_xlim(-2.6, 16)
    return figure


def draft_set():
    figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    counts = np.array([3, 14, 2, 1, 9, 0, 4, 17, 2, 6, 1, 3])
    stays = set(np.argsort(-counts)[:4].tolist())
    axis.bar(range(12), counts, color=[HOT if expert in stays else HOST for expert in range(12)], edgecolor=INK)
    for expert in sorted(stays):
        axis.text(expert, counts[expert] + 0.4, "stays", ha="center")
    axis.set(xlabel="expert of one layer", ylabel="choices in the last pass", xticks=range(12), yticks=range(0, 21, 5))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def affinity():
    figure, axis = canvas(12, 6.6)
    places = {0: (1.2, 1.4), 1: (2.6, 4.6), 2: (5.0, 2.2), 3: (6.4, 4.9), 4: (8.2, 3.2), 5: (10.6, 1.2), 6: (10.4, 4.6)}
    resident = {1, 4, 5}
    for expert, (x, y) in places.items():
        axis.plot(x, y, "o", markersize=24, color=HOT if expert in resident else FREE, markeredgecolor=INK)
        axis.text(x, y, str(expert), ha="center", va="center")
    arrow(axis, (6.9, 4.55), (7.75, 3.65))
    axis.text(6.4, 5.75, "the router chose 3, which is absent", ha="center")
    axis.text(9.0, 2.75, "nearest resident expert:\n4 drafts for it", va="top", ha="left", fontsize=9)
    axis.text(0.2, 0.3, "orange: resident. Near: alike in weights", fontsize=9)
    return figure


def retained():
    figure, axis = canvas(15, 6.4)
    rows = (
        ("pass 1", [("A", HOT, ""), ("B", HOT, ""), ("C", FETCHED, ""), ("D", FETCHED, "")], "C and D are fetched"),
        (
            "after it",
            [("A", HOT, ""), ("B", HOT, ""), ("C", FREE, "//"), ("D", FREE, "//")],
            "their slots are free, their bytes are there",
        ),
        ("pass 2", [("A", HOT, ""), ("B", HOT, ""), ("C", FREE, "//"), ("E", FETCHED, "")], "C is a hit, E overwrites D"),
    )
    for number, (name, held, text) in enumerate(rows):
        y = 4.4 - 1.9 * number
        axis.text(-0.3, y + 0.5, name, ha="right", va="center")
        for place, (letter, color, hatch) in enumerate(held):
            box(axis, 1.3 * place, y, "", color=color, hatch=hatch)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None
            axis.text(1.3 * place + 0.5, y + 0.5, letter, ha="center", va="center", bbox=behind)
        axis.text(5.6, y + 0.5, text, va="center")
    axis.set_xlim(-1.9, 15)
    return figure


def roofline():
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    intensity = np.geomspace(0.1, 1000, 200)
    axis.loglog(intensity, np.minimum(100, 2 * intensity), color=INK, linewidth=2)
    for x, reached, name in ((0.8, 1.2, "one token"), (12, 19, "a drafted batch"), (300, 70, "a prompt")):
        axis.loglog(x, reached, "o", color=FETCHED, markersize=9, markeredgecolor=INK)
        axis.loglog([x, x], [reached, min(100, 2 * x)], color=FETCHED, linestyle=":")
        axis.annotate(name, (x, reached), textcoords="offset points", xytext=(9, -11))
    axis.text(1.1, 4.2, "bytes over the link", rotation=36, ha="center")
    axis.text(180, 125, "arithmetic")
    axis.set(xlabel="operations for each byte that crosses", ylabel="operations/s", ylim=(0.3, 300), xticks=[], yticks=[])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    with plt.rc_context(STYLE):
        for draw in (slots, waves, draft_set, affinity, retained, roofline):
            figure = draw()
            figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
