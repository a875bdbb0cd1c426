"""What the engine's operators cost on this machine: linear models of measured times, and their errors. Pure.

SpecMoEOff 5.3, step 2: "micro-benchmarks -> linear models". Each operator's seconds are a constant and non-negative
coefficients times its work, fitted so that relative errors count alike for the small and the large.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

# operator -> what its time is linear in, beside a constant.
#   tokens: positions of the pass, B * T. read: positions of the cache that it reads, B * l. scores: B * T * l.
#   blocks: different experts computed. choices: tokens * A. misses: experts copied. rows: B.
WORK = {
    "attention": ("tokens", "read", "scores"),  # norm, projections, attention, router; with the routing on the host
    "pre_attention": ("tokens",),
    "attend_paged": ("tokens", "read", "scores"),
    "post_attention": ("tokens",),
    "experts": ("choices", "blocks"),
    "migrate": ("misses",),  # a layer's plan on the host and its copies, beyond its experts
    "layer": ("tokens", "read", "scores", "blocks"),  # in one program, one after the other without waiting
    "head": ("tokens",),  # logits, acceptance, and their way to the host
    "draft_head": ("rows",),  # embedding, logits and choice of one drafted token
    "lookup": ("rows",),  # prompt lookup of every row
    "stream": ("blocks",),  # a layer's experts into its buffer
    "step": ("rows",),  # what a step takes beside its operators
    # Whole layers inside real steps of the engine, with what the host and the workers do between the operators.
    "on_demand_layer": ("tokens", "read", "blocks", "misses"),
    "streamed_layer": ("tokens", "read"),  # of one work item
    "drafted_token": ("rows", "read"),  # of the self-draft, beside its layers and its head
}


class LinearCost(NamedTuple):
    """seconds = constant + sum(coefficients * work). error: median relative error, each shape predicted without itself."""

    work: tuple[str, ...]
    constant: float
    coefficients: tuple[float, ...]
    error: float

    def __call__(self, **work: float) -> float:
        return self.constant + sum(c * work[name] for c, name in zip(self.coefficients, self.work, strict=True))


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
            costs = {
                name: LinearCost(tuple(c["work"]), float(c["constant"]), tuple(map(float, c["coefficients"])), float(c["error"]))
                for name, c in raw["costs"].items()
            }
            found = Operators(costs=costs, expert_bytes=int(raw["expert_bytes"]), spread=float(raw["spread"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if set(costs) == set(WORK) and all(costs[name].work == WORK[name] for name in WORK) else None


def fit(operator: str, samples: Sequence[Sample]) -> LinearCost:
    """Least squares of the relative errors, no coefficient below 0."""
    work = WORK[operator]
    constant, *coefficients = _solve(work, samples)
    fitted = LinearCost(work=work, constant=constant, coefficients=tuple(coefficients), error=0.0)
    return fitted._replace(error=_left_out_error(work, samples, fitted))


def _solve(work: tuple[str, ...], samples: Sequence[Sample]) -> list[float]:
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([[1.0, *(sample.work[name] for name in work)] for sample in samples]) / seconds[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)  # columns of seconds and of millions of scores
    solution, _ = nnls(matrix / scale, np.ones(len(samples)))
    return (solution / scale).tolist()


def _left_out_error(work: tuple[str, ...], samples: Sequence[Sample], fitted: LinearCost) -> float:
    """Where there are too few samples to leave one out, the error of the fit itself."""
    errors = []
    for i, sample in enumerate(samples):
        rest = [*samples[:i], *samples[i + 1 :]]
        if len(rest) > len(work) + 1:
            constant, *coefficients = _solve(work, rest)
            guess = LinearCost(work, constant, tuple(coefficients), 0.0)(**sample.work)
        else:
            guess = fitted(**sample.work)
        errors.append(abs(guess / sample.seconds - 1))
    return float(np.median(errors))


def as_table(operators: Operators) -> str:
    """For people: each operator's constant and coefficients in microseconds, and its error."""
    width = max(map(len, operators.costs))
    lines = []
    for name, cost in operators.costs.items():
        terms = "".join(f" + {c * 1e6:.4g} {work}" for work, c in zip(cost.work, cost.coefficients, strict=True) if c)
        lines.append(f"{name:<{width}}  error {cost.error:5.1%}  us = {cost.constant * 1e6:.1f}{terms}")
    return "\n".join(lines)
