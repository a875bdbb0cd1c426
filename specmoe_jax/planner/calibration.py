"""Model behaviour that a plan depends on: the acceptance of each draft, and the skew of the routing. Pure."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.measured.case import choosing
from specmoe_jax.planner.routing import choice_probabilities, distinct
from specmoe_jax.planner.workload import Workload, chance_deviation
from specmoe_jax.support.statistics import gini


class Acceptance(NamedTuple):
    """rate: the probability that a drafted token is accepted if those before it were; of a tree, one of a level's. experts: N
    that it was measured with. unlike: of Workload. assumed: not measured; the rate may then be a map, as Workload.acceptance."""

    rate: float
    experts: float | None = None
    unlike: float = 0.0
    assumed: bool = False


class Calibration(NamedTuple):
    """acceptance: of the drafts that were measured; eagle_tree: a head's trees (search_starts.tree).
    skew: Gini coefficient of the experts' counts; None: that of the workload.

    row_share, run_share: how much of an independent token's choice one more row makes, and one more position of a row.
    measured: on prompts of the user; else assumed.
    """

    acceptance: dict[str, Acceptance]
    skew: float | None
    measured: bool
    row_share: float = 1.0
    run_share: float = 1.0

    def workload(self, base: Workload, plan: Plan, config: ModelConfig) -> Workload:
        """The workload under this plan's draft."""
        skew = base.skew_of(config) if self.skew is None else self.skew
        if not plan.drafting.drafts:
            return dataclasses.replace(base, skew=skew)
        found = self.acceptance_of(plan, config, skew)
        return dataclasses.replace(base, skew=skew, acceptance=found.rate, unlike=found.unlike)

    def acceptance_of(self, plan: Plan, config: ModelConfig, skew: float) -> Acceptance:
        """Of this plan's draft, measured or assumed."""
        draft = plan.drafting
        found = next((self.acceptance[name] for name in draft.variants(plan) if name in self.acceptance), None)
        if found is None:
            return Acceptance(draft.assumed_acceptance, assumed=True)
        return found._replace(rate=draft.rate(found, plan, config, skew))

    def to_dict(self) -> dict:
        return self._asdict() | {"acceptance": {name: found._asdict() for name, found in self.acceptance.items()}}

    @staticmethod
    def from_dict(raw: dict) -> "Calibration | None":
        """What `to_dict` gave; None for anything else."""
        try:
            acceptance = {name: Acceptance(**found) for name, found in raw["acceptance"].items()}
            skew, shares = float(raw["skew"]), {name: float(raw[name]) for name in ("row_share", "run_share")}
            return Calibration(acceptance=acceptance, skew=skew, measured=bool(raw["measured"]), **shares)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


ASSUMED = Calibration(acceptance={}, skew=None, measured=False)


def fitted_shares(config: ModelConfig, skew: float, seen: list[tuple[int, int, float]]) -> tuple[float, float]:
    """row_share and run_share by which passes need the experts that they did: (rows, positions, experts of a layer) of each."""
    probabilities = choice_probabilities(config.num_experts, config.experts_per_token, skew)
    rows, new, needed = (np.array(column, float) for column in zip(*seen, strict=True))
    most = int(rows.max() * new.max())
    table = np.array([distinct(probabilities, tokens) for tokens in range(most + 1)])

    def error(shares: tuple[float, float]) -> float:
        return float(((np.interp(choosing(rows, new, *shares), range(most + 1), table) / needed - 1) ** 2).sum())

    steps = np.linspace(0.0, 1.0, 51).tolist()
    return min(itertools.product(steps, steps), key=error)


def unlike_rows(steps: np.ndarray, rate: float, length: int, tokens: int) -> float:
    """Workload.unlike: what of the relative deviation of the steps [rows] that `tokens` tokens took is not chance."""
    seen = float(np.std(steps) / np.mean(steps))
    return math.sqrt(max(seen**2 - chance_deviation(rate, length, tokens) ** 2, 0.0))


def counted_skew(config: ModelConfig, counts: np.ndarray) -> float:
    """Gini coefficient of counts [L, E], the mean over layers, at most what the model's top-k allows."""
    largest = (1 - config.experts_per_token / counts.shape[1]) * 0.999
    return float(np.clip(gini(counts).mean(), 0.0, largest))
