"""The cost of the engine's operators on this machine: linear models of measured times, and their errors. Pure.

SpecMoEOff 5.3, step 2: "micro-benchmarks -> linear models". Each operator's seconds are a constant and non-negative
coefficients times its work, fitted so that relative errors count alike for small and large ones. Programs of a few tokens are not
linear (libraries change their kernels with the shape), so the residual is interpolated between the measured sizes (ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

# operator -> what its time is linear in, beside a constant.
#   tokens: positions of the pass, B * T. read: positions of the cache that it reads, B * l. scores: B * T * l.
#   blocks: different experts computed. choices: tokens * A. misses: experts copied. rows: B. waves: of a layer whose dispatch may
#   not fit at once, 0 where it always does (another program). hosted: experts that the host's cores compute.
WORK = {
    # Alone, warm.
    "attention": ("tokens", "read", "scores"),  # norm, projections, attention, router; with the routing on the host
    "pre_attention": ("tokens",),
    "attend_paged": ("tokens", "read", "scores"),
    "post_attention": ("tokens",),
    "experts": ("choices", "blocks"),
    "head": ("tokens",),  # logits, acceptance, and their way to the host
    "draft_head": ("rows",),  # embedding, logits and choice of one drafted token
    "stream": ("blocks",),  # a layer's experts into its buffer
    # Inside real steps of the engine, with what the host and the workers do between the operators.
    "step": ("rows",),  # what a step takes beside draft, layers and head
    "resident_layer": ("tokens", "read", "scores", "blocks"),
    "on_demand_layer": ("tokens", "read", "blocks", "misses", "waves"),
    "hosted_layer": ("tokens", "read", "misses", "hosted"),  # with a host_share, and nothing resident
    "streamed_layer": ("items", "tokens", "read"),  # of all `items` micro-batches
    "tree_path": ("tokens",),  # what a pass over trees takes beside that: the accepted path, its rows brought together
    # Drafts beside their draft_heads (a tree: with them). calls: drafted tokens of a row (a tree: levels) times layers; call_rows,
    # call_read: times rows (a tree: and its branches), times the cached positions. waited: 1 after a pass that slept at the link.
    "lookup": ("rows", "read"),  # prompt lookup of every row
    "self_draft": ("waited", "rows", "calls", "call_rows", "call_read", "call_blocks", "prefetches", "prefetched_rows"),
    "eagle_draft": ("rows", "calls", "call_rows", "call_read"),
    "eagle_tree_draft": ("rows", "calls", "call_rows"),
}
# The work between whose measured values the ratio of measured to linear is interpolated, by its logarithm.
SIZE = dict.fromkeys(WORK, "tokens") | {
    "experts": "choices",
    "stream": "blocks",
    **dict.fromkeys(("draft_head", "step", "lookup", "self_draft", "eagle_draft", "eagle_tree_draft"), "rows"),
}


class LinearCost(NamedTuple):
    """seconds = (constant + sum(coefficients * work)) * ratio at its size. error: median relative error, each shape predicted
    without itself. size: the work that the ratios belong to, none without ratios. ratios: (value, measured / linear), ascending.
    """

    work: tuple[str, ...]
    constant: float
    coefficients: tuple[float, ...]
    error: float
    size: str | None = None
    ratios: tuple[tuple[float, float], ...] = ()

    def __call__(self, **work: float) -> float:
        return self.linear(work) * self._ratio(work)

    def linear(self, work: dict[str, float]) -> float:
        return self.constant + sum(c * work[name] for c, name in zip(self.coefficients, self.work, strict=True))

    def _ratio(self, work: dict[str, float]) -> float:
        if not self.ratios:
            return 1.0
        assert self.size is not None  # the ratios are by it
        values, ratios = zip(*self.ratios, strict=True)
        return float(np.interp(np.log(max(work[self.size], values[0])), np.log(values), ratios))


class Sample(NamedTuple):
    """One measured shape of an operator."""

    work: dict[str, float]
    seconds: float


class Operators(NamedTuple):
    """costs: by the names of WORK. expert_bytes: of the blocks that were moved. spread: relative half-width of the timings."""

    costs: dict[str, LinearCost]
    expert_bytes: int
    spread: float

    def seconds(self, operator: str, **work: float) -> float:
        """Of one call; `work` may hold more than the operator asks for."""
        return self.costs[operator](**work)

    def to_dict(self) -> dict:
        return {
            "costs": {name: cost._asdict() for name, cost in self.costs.items()},
            "expert_bytes": self.expert_bytes,
            "spread": self.spread,
        }

    @staticmethod
    def from_dict(raw: dict) -> "Operators | None":
        """What `to_dict` gave; None for anything else."""
        try:
            costs = {name: _cost_of(c) for name, c in raw["costs"].items()}
            found = Operators(costs=costs, expert_bytes=int(raw["expert_bytes"]), spread=float(raw["spread"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if set(costs) == set(WORK) and all(costs[name].work == WORK[name] for name in WORK) else None


def draft_work(
    *, layers: float, length: float, rows: float, context: float, blocks: float = 0.0, ahead: bool = False, waited: float = 0.0
) -> dict[str, float]:
    """The work of a draft of `length` tokens through `layers` layers. blocks: experts of a layer that it computes. ahead: with
    prefetch=draft. waited: see WORK."""
    calls = layers * length
    return {
        "waited": waited,
        "rows": rows,
        "calls": calls,
        "call_rows": calls * rows,
        "call_read": calls * rows * context,
        "call_blocks": calls * blocks,
        "prefetches": calls * ahead,
        "prefetched_rows": calls * rows * ahead,
    }


def _cost_of(raw: dict) -> LinearCost:
    return LinearCost(
        work=tuple(raw["work"]),
        constant=float(raw["constant"]),
        coefficients=tuple(map(float, raw["coefficients"])),
        error=float(raw["error"]),
        size=raw["size"],
        ratios=tuple((float(value), float(ratio)) for value, ratio in raw["ratios"]),
    )


def fit(operator: str, samples: Sequence[Sample]) -> LinearCost:
    """Least squares of the relative errors, no coefficient below 0, then the ratios at the sizes that were measured."""
    found = _fitted(operator, samples)
    return found._replace(error=_left_out_error(operator, samples, found))


def _fitted(operator: str, samples: Sequence[Sample]) -> LinearCost:
    work, size = WORK[operator], SIZE[operator]
    constant, *coefficients = _solve(work, samples)
    line = LinearCost(work=work, constant=constant, coefficients=tuple(coefficients), error=0.0)
    logs: dict[float, list[float]] = {}
    for sample in samples:
        logs.setdefault(sample.work[size], []).append(np.log(sample.seconds / line.linear(sample.work)))
    return line._replace(size=size, ratios=tuple((value, float(np.exp(np.mean(logs[value])))) for value in sorted(logs)))


def _solve(work: tuple[str, ...], samples: Sequence[Sample]) -> list[float]:
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([[1.0, *(sample.work[name] for name in work)] for sample in samples]) / seconds[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)  # columns of seconds and of millions of scores
    solution, _ = nnls(matrix / scale, np.ones(len(samples)))
    return (solution / scale).tolist()


def _left_out_error(operator: str, samples: Sequence[Sample], fitted: LinearCost) -> float:
    """Where there are too few samples to leave one out, the error of the fit itself."""
    errors = []
    for i, sample in enumerate(samples):
        rest = [*samples[:i], *samples[i + 1 :]]
        guess = _fitted(operator, rest) if len(rest) > len(WORK[operator]) + 1 else fitted
        errors.append(abs(guess(**sample.work) / sample.seconds - 1))
    return float(np.median(errors))


def as_table(operators: Operators) -> str:
    """For people: each operator's constant and coefficients in microseconds, and its error.

    A difference of measured times (tree_path) can be nothing, and then the error of it says nothing.
    """
    width = max(map(len, operators.costs))
    lines = []
    for name, cost in operators.costs.items():
        terms = "".join(f" + {c * 1e6:.4g} {work}" for work, c in zip(cost.work, cost.coefficients, strict=True) if c)
        lines.append(
            f"{name:<{width}}  error {'noise' if cost.error > 1 else f'{cost.error:.1%}':>5}  us = {cost.constant * 1e6:.1f}{terms}"
        )
    return "\n".join(lines)
