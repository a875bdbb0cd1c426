"""PNGs of the roofline and of a simulated pass. Need matplotlib (the [plot] extra); both write one file."""

import contextlib
import pathlib

import numpy as np

from specmoe_jax.offload.stream_schedule import RESOURCES
from specmoe_jax.planner.roofline import Point
from specmoe_jax.planner.simulate import Simulation


def save_roofline(points: tuple[Point, ...], title: str, path: pathlib.Path) -> None:
    """A roof a level, a mark an operator. Raises ImportError where matplotlib is missing."""
    with _figure(path, (9, 6)) as axis:
        used = list(dict.fromkeys(point.roof for point in points))
        lowest, highest = (limit(point.intensity for point in points) for limit in (min, max))
        ridge = max(roof.flops / roof.bytes_per_s for roof in used)
        x = np.geomspace(lowest / 4, 4 * max(highest, ridge), 200)
        for color, roof in enumerate(used):
            label = f"{roof.level}, {roof.bytes_per_s / 1e9:,.0f} GB/s -> {roof.unit}, {roof.flops / 1e12:,.2f} TFLOP/s"
            axis.loglog(x, np.minimum(roof.flops, x * roof.bytes_per_s), color=f"C{color}", label=label)
        for marker, point in zip("osD^v*PX", points, strict=False):
            color = f"C{used.index(point.roof)}"
            axis.loglog(point.intensity, point.attainable, marker, color=color, markersize=9, label=point.operator)
        axis.set(xlabel="flop per byte of the level", ylabel="flop/s", title=title)
        axis.legend(fontsize=8)


def save_gantt(simulation: Simulation, title: str, path: pathlib.Path) -> None:
    """The last simulated pass: a lane a resource, a colour a kind of task. Raises ImportError where matplotlib is missing."""
    with _figure(path, (14, 4)) as axis:
        kinds = list(dict.fromkeys(span.kind for span in simulation.spans))
        for color, kind in enumerate(kinds):
            for lane, resource in enumerate(RESOURCES):
                bars = [(s.start_s, s.end_s - s.start_s) for s in simulation.spans if (s.kind, s.resource) == (kind, resource)]
                axis.broken_barh(bars, (lane - 0.4, 0.8), color=f"C{color}", linewidth=0)
            axis.plot([], [], color=f"C{color}", linewidth=6, label=kind)
        axis.set(yticks=range(len(RESOURCES)), yticklabels=RESOURCES, xlabel="seconds", title=f"{title} (simulated)")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


@contextlib.contextmanager
def _figure(path: pathlib.Path, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=size)
    try:
        yield axis
        figure.tight_layout()
        figure.savefig(path, dpi=100)
    finally:
        plt.close(figure)
