"""Times steps of the real engine over a small model, for the planner's operators (profile.py).

What runs between a step's programs (dispatch, the host's planning, the wake-up of workers, cold caches) is most of a small
model's time and in no operator alone, so layers and drafts are measured in place, as their share of a step.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.drafts.executors import executor_of
from specmoe_jax.engine.engine import Engine
from specmoe_jax.engine.state import StepInfo
from specmoe_jax.models.model import Model
from specmoe_jax.planner.measured.operators import LinearCost, Sample, draft_work, fit
from specmoe_jax.planner.memory.account import account, cache_positions

ROWS = (1, 4, 16, 32, 64)  # batches
LENGTHS = (48, 320)  # of the prompts; the long ones of LONG_ROWS alone, whose prefill is quick
LONG_ROWS = (1, 16)
ROUNDS = 3  # of each plan, with the others in between; the fastest one counts, because disturbances only add time
STEPS, SETTLE, LEAST, BUDGET_S = 10, 2, 3, 0.5  # of a plan in a round
NEW_TOKENS = 128  # of a row at most
LAYER_ON_LINK_S = 0.02  # that a layer's experts take on the emulated link, behind which cores go to sleep


class Case(NamedTuple):
    """A plan's fields beside the batch, and the tokens of each prompt. group: the quantity to measure. slots: of the expert
    pool, None for as many as the plan wants.
    """

    group: str
    rows: int
    length: int
    fields: dict
    slots: int | None = None

    @property
    def is_tree(self) -> bool:
        return "draft_tree_top_k" in self.fields

    @property
    def operator(self) -> str | None:
        """That its drafting shows, None where nothing is drafted."""
        return self.plan("float32").drafting.operator(trees=self.is_tree)

    def plan(self, dtype: str) -> Plan:
        return Plan(preset="probe", batch_size=self.rows, **self.fields).replace(dtype=dtype)


class Ran(NamedTuple):
    """Medians of the steps of a case's quickest round: work of a layer, seconds of draft, of the rest without the commit, and of
    the commit."""

    case: Case
    work: dict[str, float]
    draft_s: float
    pass_s: float
    commit_s: float


def cases(num_experts: int, layer_bytes: int, max_positions: int, *, hosts: bool) -> list[Case]:
    """Batches, flows, drafts and link rates; few of each, because costs are linear between them. hosts: whether plans may have a
    host_share.

    Each draft names the plans that tell its cost (`DraftDescription.timed`): one that runs the target's gates needs a flow that
    keeps experts, the others are timed beside resident ones. Passes of several tokens are those of the draft without layers.
    """
    drafts = [DRAFTS.description(name) for name in DRAFTS]
    drafted = [(d, {"draft": d.name} | fields, place) for d in drafts for place, fields in enumerate(d.timed(num_experts))]
    looked_up = next(fields for d, fields, _ in drafted if d.operator(trees=False) == "lookup")
    gated = next(fields for d, fields, _ in drafted if d.gated)
    some, most = -(-num_experts // 3), -(-num_experts // 2)
    resident, streams = {"expert_flow": "resident"}, {"expert_flow": "stream", "kv_tier": "host"}
    slow = {"link_bytes_per_s": layer_bytes / LAYER_ON_LINK_S}
    long = min(LENGTHS[1], max_positions // 2)
    found = []
    for rows in ROWS:
        for length in _lengths(rows, long):
            found += [Case("resident", rows, length, resident), Case("on_demand", rows, length, {})]
            found += [Case("streamed", rows, length, streams)]
        if hosts:
            found += [Case("hosted", rows, length, {"host_share": 1.0}) for length in _lengths(rows, long)]
            found.append(Case("hosted", rows, LENGTHS[0], {"host_share": 0.5}))
        for draft, fields, place in drafted:
            group, flow = ("on_demand", {}) if draft.gated else ("resident", resident)
            lengths = LENGTHS[:1] if place else _lengths(rows, long)
            found += [Case(group, rows, length, flow | fields) for length in lengths]
        found += [Case("on_demand", rows, LENGTHS[0], {"cached_experts": most}), Case("on_demand", rows, LENGTHS[0], looked_up)]
        found += [Case("on_demand", rows, LENGTHS[0], {}, slots=slots) for slots in (some, most)]
        ahead = {"draft_length": 4, "prefetch": "draft", "draft_experts": most}
        found += [Case("linked", rows, LENGTHS[0], slow | gated | more) for more in ({}, ahead)]
        items = (1, 2) if rows > 1 else (1,)
        found += [Case("streamed", rows, LENGTHS[0], streams | looked_up | {"micro_batches": count}) for count in items]
    return found


def _lengths(rows: int, long: int) -> tuple[int, ...]:
    return (LENGTHS[0], long) if rows in LONG_ROWS else (LENGTHS[0],)


def run(
    model: Model,
    found: Iterable[Case],
    *,
    on_case: Callable[[], object] = lambda: None,
    on_round: Callable[[], object] = lambda: None,
) -> list[Ran]:
    """Every case, ROUNDS times over. on_case, on_round: called after each."""
    found = list(found)
    rounds: list[list[Ran]] = [[] for _ in found]
    for _ in range(ROUNDS):
        for case, seen in zip(found, rounds, strict=True):
            seen.append(_ran(model, case, _steps(model, case)))
            on_case()
        on_round()
    return [min(seen, key=lambda ran: ran.draft_s + ran.pass_s + ran.commit_s) for seen in rounds]


def _steps(model: Model, case: Case) -> list[StepInfo]:
    length = max(min(case.length, model.config.max_positions // 2), 1)
    plan, limit = case.plan(model.dtype), min(NEW_TOKENS, model.config.max_positions - length)
    if case.slots is not None:
        wants = account(model.config, plan, batch_rows=case.rows, positions=cache_positions(length + limit, plan))
        spare_bytes = (wants.num_slots - case.slots) * wants.slot_bytes
        plan = plan.replace(device_memory_bytes=wants.accelerator_bytes - spare_bytes)
    engine = Engine(model, plan, **executor_of(plan).random_inputs(model))
    prompts = np.random.default_rng(case.rows).integers(model.config.vocab_size, size=(case.rows, length)).tolist()
    state, infos = engine.init(prompts, SamplingParams(max_new_tokens=limit, ignore_eos=True)), []
    start_s = time.perf_counter()
    while not state.done and len(infos) < STEPS and (len(infos) < LEAST or time.perf_counter() - start_s < BUDGET_S):
        state, info = engine.step(state)
        infos.append(info)
    return infos[SETTLE:] or infos[-1:]


def _ran(model: Model, case: Case, infos: list[StepInfo]) -> Ran:
    def middle(value: Callable) -> float:
        return float(statistics.median(map(value, infos)))

    layers, new = model.config.num_moe_layers, case.plan(model.dtype).tokens_per_pass
    context = middle(lambda info: info.context)
    work = {
        "rows": case.rows,
        "tokens": case.rows * new,
        "read": context,
        "scores": new * context,
        "blocks": middle(lambda info: info.verify.hits + info.verify.misses) / layers,
        "misses": middle(lambda info: info.verify.fetched) / layers,
        "hosted": middle(lambda info: info.verify.on_host) / layers,
        "items": case.fields.get("micro_batches", 1),
        "waves": 0.0 if case.slots is None else middle(lambda info: info.verify.waves) / layers,
    }
    whole_s, draft_s = middle(lambda info: info.step_s), middle(lambda info: info.drafting_s)
    commit_s = middle(lambda info: info.commit_s)
    return Ran(case, work, draft_s, max(whole_s - draft_s - commit_s, 1e-6), commit_s)


def fit_steps(config: ModelConfig, ran: list[Ran], alone: dict[str, LinearCost]) -> dict[str, LinearCost]:
    """Layers and drafts as steps show them. alone: head and draft_head."""
    plain = [one for one in ran if one.case.group == "resident" and "draft" not in one.case.fields]
    found = {"step": fit("step", [Sample(one.work, one.draft_s + one.commit_s) for one in plain])}
    for group in ("resident", "on_demand", "streamed", "hosted"):
        own = [one for one in ran if one.case.group == group and not one.case.is_tree]
        if not own:  # without kernels no plan is hosted, and none asks
            own = [one for one in ran if one.case.group == "on_demand"]
        found[f"{group}_layer"] = fit(f"{group}_layer", [_layer(config, one, alone, found["step"]) for one in own])
    trees = [_layer(config, one, alone, found["step"]) for one in ran if one.case.is_tree]
    beside = [config.num_layers * (sample.seconds - found["resident_layer"](**sample.work)) for sample in trees]
    found["tree_path"] = fit("tree_path", [Sample(t.work, max(s, 1e-6)) for t, s in zip(trees, beside, strict=True)])
    for name in dict.fromkeys(one.case.operator for one in ran if one.case.operator):
        own = [one for one in ran if one.case.operator == name]
        found[name] = fit(
            name, [Sample(one.work, one.draft_s) if name == "lookup" else _drafted(config, one, alone) for one in own]
        )
    return found


def _layer(config: ModelConfig, one: Ran, alone: dict[str, LinearCost], step: LinearCost) -> Sample:
    """A layer's share of a step without draft, head and fixed costs."""
    layers_s = one.pass_s + one.commit_s - alone["head"](**one.work) - step(**one.work)
    blocks = one.work["blocks"] or _used(config, one.work["tokens"])
    return Sample(one.work | {"blocks": blocks}, max(layers_s / config.num_layers, 1e-6))


def _used(config: ModelConfig, tokens: float) -> float:
    """Different experts that tokens of random weights choose, where a flow does not count them."""
    return config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** tokens)


def _drafted(config: ModelConfig, one: Ran, alone: dict[str, LinearCost]) -> Sample:
    """A draft beside the embedding, logits and choice of its tokens; a tree with them."""
    length, rows = one.case.fields["draft_length"], one.case.rows
    width = rows * one.case.fields.get("draft_tree_top_k", 1)
    resident = min(one.case.fields.get("draft_experts", 0), _used(config, rows))
    ahead = one.case.fields.get("prefetch") == "draft"
    layers = one.case.plan("float32").drafting.layers(config)
    work = draft_work(
        layers=layers,
        length=length,
        rows=width,
        context=one.work["read"] / rows,
        blocks=resident,
        ahead=ahead,
        waited=float(one.case.group == "linked"),
    )
    choice_s = 0.0 if one.case.is_tree else length * alone["draft_head"](rows=rows)
    return Sample(work, max(one.draft_s - choice_s, 1e-6))
