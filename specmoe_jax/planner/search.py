"""The plan for a model, a machine and a workload: pruned enumeration over predictions (SpecMoEOff 5.3). Pure.

Decided before, as in the paper: the largest batch that fits (halved only while that helps). The rest is scanned for each way in
which experts can flow: kinds and lengths of drafts, resident experts N, retained experts, prefetch, micro-batches. A scan of an
ordered choice ends when it no longer helps, because its cost grows faster than its gain.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS
from specmoe_jax.planner.drafts.protocol import described
from specmoe_jax.planner.drafts.search_starts import WORTH, Axis, SearchStart
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.flows.protocol import ExpertFlowDescription
from specmoe_jax.support.errors import MachineError, PlanError

LARGEST_BATCH = 1024
WORTH_OF_A_DRAFT = 1.15  # acceptance differs from prompt to prompt
EQUAL = 1.01  # closer predictions are one: then the smaller value is taken, shorter drafts and fewer pinned experts (with
# `retain`, what was used last is found again more often than what is used most: 1.06 and 1.16 at equal predictions)


class Choice(NamedTuple):
    plan: Plan
    prediction: Prediction
    tokens_per_s: float  # of the job: a last batch that is not full counts, and rows that end before others


class Found(NamedTuple):
    """best and the next one of another kind (preset, draft), None where there is none. tried: plans that were predicted.

    refusal: why the largest plan that did not fit was refused, None if all did.
    """

    best: Choice
    runner_up: Choice | None
    tried: int
    refusal: str | None


def search(
    config: ModelConfig,
    evaluate: Callable[[Plan], Prediction],
    *,
    requests: int,
    drafts: Sequence[str] = ("none",),
    fixed: dict | None = None,
) -> Found:
    """The fastest plan. evaluate: plan -> its prediction, raising PlanError for what does not fit or hold.

    drafts: kinds to consider (a plan's, or eagle_tree for trees), those whose acceptance is known or that are asked for. fixed:
    fields of the plan that are given; a plan that contradicts them is not considered. Raises PlanError if no plan is left, with the
    reason of the last one.
    """
    fixed = fixed or {}
    scan = _Scan(config, evaluate, requests, fixed)
    flows = [fixed["expert_flow"]] if "expert_flow" in fixed else EXPERT_FLOWS
    starts = _starts(config, [EXPERT_FLOWS.description(name) for name in flows], drafts)
    choices = [choice for start in starts if (choice := scan.largest_batch(start))]
    if not choices:
        raise PlanError(f"no plan fits: {scan.refusal}" if scan.refusal else "no plan was considered; give at least one draft")
    ranked = sorted(choices, key=lambda choice: (-_preference(choice), _bytes(choice)))
    best = ranked[0]
    others = [choice for choice in ranked[1:] if _kind(choice.plan) != _kind(best.plan)]
    return Found(best=best, runner_up=others[0] if others else None, tried=scan.tried, refusal=scan.refusal)


def _kind(plan: Plan) -> tuple:
    return plan.flow, plan.drafting.name, bool(plan.cached_experts)


def _preference(choice: Choice) -> float:
    """Tokens/s, a little less for a plan with a draft, whose acceptance is an estimate too, and for one that moves experts."""
    drafts = WORTH_OF_A_DRAFT if choice.plan.drafting.drafts else 1.0
    return choice.tokens_per_s / drafts / (1.0 if choice.plan.flow.all_resident else WORTH)


def _bytes(choice: Choice) -> int:
    """Of two plans as fast as each other the one that takes less memory is better."""
    return choice.prediction.account.accelerator_bytes + choice.prediction.account.host_bytes


def _starts(config: ModelConfig, flows: Sequence[ExpertFlowDescription], drafts: Sequence[str]) -> Iterator[SearchStart]:
    """Every combination of a flow and a draft that can run."""
    families = itertools.chain.from_iterable(flow.search_starts(config) for flow in flows)
    for family, (draft, trees) in itertools.product(families, map(described, drafts)):
        start = draft.start(config, family, trees=trees)
        if start is not None:
            yield start


def _changes(field: str, value) -> dict:
    return value if isinstance(value, dict) else {field: value}


class _Scan:
    """Predictions that were made, and the search of one family."""

    def __init__(self, config: ModelConfig, evaluate, requests: int, fixed: dict):
        self._config, self._evaluate, self._requests, self._fixed = config, evaluate, requests, fixed
        self.tried, self.refusal = 0, None
        self._score = functools.cache(self._score)

    def largest_batch(self, start: SearchStart) -> Choice | None:
        """The best choice of a family: at the largest batch that fits, then at smaller ones while those are better."""
        if "batch_size" in self._fixed:
            return self._scan_axes(start, start.plan)
        best, rows = None, min(self._requests, LARGEST_BATCH)
        while rows >= 1:
            found = self._scan_axes(start, start.plan.replace(batch_size=rows))
            if best and (not found or found.tokens_per_s <= best.tokens_per_s):
                break
            best, rows = found or best, rows // 2
        return best

    def _scan_axes(self, start: SearchStart, plan: Plan) -> Choice | None:
        """One choice after the other, twice over where there are several, because they depend on each other."""
        best = self._first(start, plan)
        if best is None:
            return None
        for _ in range(2 if len(start.axes) > 1 else 1):
            before = best
            for axis in start.axes:
                if axis.field not in self._fixed:
                    best = self._scan_values(best, axis)
            if best is before:
                break
        return best

    def _first(self, start: SearchStart, plan: Plan) -> Choice | None:
        """The start as it is, or with the smallest values where that does not fit."""
        free = [axis for axis in start.axes if axis.field not in self._fixed]
        smallest = {k: v for axis in free for k, v in _changes(axis.field, axis.values[0]).items()}
        return self._score(plan) or self._score(plan.replace(**smallest))

    def _scan_values(self, best: Choice, axis: Axis) -> Choice:
        """All values; where the axis does not ask for the whole, until two in a row are worse than the best."""
        (field, values), worse = axis[:2], 0
        for place, value in enumerate(values):
            choice = self._score(best.plan.replace(**_changes(field, value)))
            tried = [_changes(field, earlier)[field] for earlier in values[:place]]
            smaller = getattr(best.plan, field) in [_changes(field, later)[field] for later in values[place + 1 :]]
            gain = axis.least_gain or (1 / EQUAL if smaller else EQUAL)
            if choice and choice.tokens_per_s > best.tokens_per_s * gain:
                best, worse = choice, 0
            elif not axis.whole and (choice is None or (worse := worse + 1) == 2):
                if choice is None or getattr(best.plan, field) in tried:
                    break
        return best

    def _score(self, plan: Plan) -> Choice | None:
        """None for a plan that contradicts what is given, does not hold or does not fit."""
        try:
            plan = plan.replace(**self._fixed).validate(self._config)
            self.tried += 1
            prediction = self._evaluate(plan)
        except PlanError as e:
            if self.refusal is None or not isinstance(e, MachineError):  # which nobody can change
                self.refusal = str(e)
            return None
        share = plan.flow.busy_share(self._requests, prediction.rows, prediction.slowest_row_factor)
        return Choice(plan, prediction, prediction.tokens_per_s * share)
