"""Chooses a plan for a model on a machine: the measurements of both feed the planner's search."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from specmoe_jax.autotune.calibrate import cached_calibration
from specmoe_jax.autotune.probe import probe
from specmoe_jax.autotune.profile import cached_profile
from specmoe_jax.checkpoints.loader import is_mapped
from specmoe_jax.checkpoints.tokenizer import Tokenizer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import DRAFTS, RETAIN_POLICIES
from specmoe_jax.models.model import Model
from specmoe_jax.models.packing import planned
from specmoe_jax.planner.calibration import ASSUMED, Calibration
from specmoe_jax.planner.drafts.checks import SOME_DRAFTS_USE
from specmoe_jax.planner.drafts.protocol import described
from specmoe_jax.planner.estimate import Prediction, predict
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.measured.operators import Operators
from specmoe_jax.planner.measured.predict import refine
from specmoe_jax.planner.search import Choice, Found, search
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import PlanError

SAFE_SHARE = 0.95  # of an accelerator's memory; the compiler's scratch is not in the account
REQUESTS = 64  # if the number is not given


class Knowledge(NamedTuple):
    """The inputs of a prediction. operators: of this machine, None to predict from the hardware's rates. is_mapped: whether experts
    can be computed from the pages of their files (checkpoints.loader.is_mapped)."""

    hardware: Hardware
    workload: Workload
    calibration: Calibration = ASSUMED
    operators: Operators | None = None
    is_mapped: bool = False


class Job(NamedTuple):
    """Of the prompts of a job: mean tokens, and new tokens that they ask for at most."""

    prompt_tokens: int
    new_tokens: int


def job_of(tokenizer: Tokenizer | None, prompts: Sequence, limits: Sequence[int]) -> Job:
    """prompts: texts or token ids, a sample; limits: new tokens of each."""
    lengths = [len(tokenizer.encode(p)) if isinstance(p, str) and tokenizer else len(p) for p in prompts]
    lengths, limits = [n for n in lengths if n] or [1], list(limits) or [1]
    return Job(prompt_tokens=round(sum(lengths) / len(lengths)), new_tokens=round(sum(limits) / len(limits)))


def know(
    config: ModelConfig,
    dtype: str,
    path: pathlib.Path | None,
    job: Job,
    *,
    hardware: Hardware | None = None,
    progress: str | bool = False,
) -> Knowledge:
    """What was measured of this machine (the hardware now, if never before, with a bar) and of this checkpoint (if ever).

    hardware: another machine, whose operators nobody has measured.
    """
    window = config.max_positions
    prompt = max(min(job.prompt_tokens, window - 1), 1)
    encoder = config.encoder is not None
    return Knowledge(
        hardware=hardware or probe(progress=progress),
        workload=Workload(
            prompt_tokens=1 if encoder else prompt,
            new_tokens=max(min(job.new_tokens, window - (1 if encoder else prompt)), 1),
            source_tokens=prompt if encoder else 0,
        ),
        calibration=(path and cached_calibration(path)) or ASSUMED,
        operators=cached_profile(config, dtype) if hardware is None else None,
        is_mapped=path is not None and is_mapped(path, dtype),
    )


def as_line(found: Found) -> str:
    """For people: the plan's main choices, its prediction, the bottleneck, and the runner-up."""
    best = found.best
    text = f"{describe(best.plan)}: about {best.tokens_per_s:,.0f} tokens/s predicted, bound by the {best.prediction.binding}"
    if found.runner_up is not None:
        text += f"; next {describe(found.runner_up.plan)} with {found.runner_up.tokens_per_s:,.0f}"
    return text


def describe(plan: Plan) -> str:
    """The non-default choices of a plan, as flags."""
    shown = (
        "draft",
        "draft_length",
        "draft_tree_tokens",
        "draft_experts",
        "draft_top_k",
        "draft_stop",
        "cached_experts",
        "prefetch",
        "host_share",
        "retain",
        "retain_policy",
        "guard",
        "batch_size",
        "micro_batches",
    )
    values = {name: getattr(plan, name) for name in shown}
    parts = [f"{k}={v}" for k, v in values.items() if v not in (None, False, "none") and (k, v) != ("micro_batches", 1)]
    return " ".join([plan.flow.name, *parts])


def evaluate(config: ModelConfig, plan: Plan, known: Knowledge) -> Prediction:
    """The prediction of one plan, by the measured operators where there are some. Raises PlanError for what does not fit."""
    if plan.flow.reads_pages(plan) and not known.is_mapped:
        raise PlanError(f"expert_flow={plan.flow.name} with expert_tier=disk is for files of specmoe convert --format=specmoe")
    workload = known.calibration.workload(known.workload, plan, config)
    prediction = predict(config, plan, known.hardware, workload, interval=False)
    own, memory = prediction.account, known.hardware.host_memory_bytes
    if known.hardware.accelerator_is_cpu and own.accelerator_bytes + own.host_bytes > memory:
        raise PlanError(
            f"{own.accelerator_bytes} bytes for computation and {own.host_bytes} of experts lie in the same {memory:.0f} bytes of "
            "memory; give a smaller batch, or leave experts on disk: expert_tier=disk"
        )
    if known.operators is None or own.draft_pages or not _is_measured(config, plan):
        return prediction
    shares = {"row_share": known.calibration.row_share, "run_share": known.calibration.run_share}
    return refine(
        prediction, config, plan, known.operators, workload, accelerator_is_cpu=known.hardware.accelerator_is_cpu, **shares
    )


def _is_measured(config: ModelConfig, plan: Plan) -> bool:
    """Whether the operators that were measured (profile.py) are those that the plan runs."""
    elsewhere = plan.expert_tier == "disk" or planned(config.experts, plan.expert_dtype).packing or config.encoder
    return plan.flow.is_measured(plan) and plan.drafting.is_measured and not elsewhere


def choose(
    config: ModelConfig, known: Knowledge, *, requests: int = REQUESTS, fixed: dict | None = None, head: bool = False
) -> Found:
    """The best plan and the runner-up. fixed: fields of the plan that are given. head: whether an EAGLE head is at hand.

    Drafts are considered if their acceptance was measured or they are requested, the self-draft also if not all experts fit on
    the accelerator; all with an adaptive length, which ends drafting that does not pay. Retained experts are evicted in the order
    that was measured best, which predictions do not know. Raises PlanError if nothing fits.
    """
    fixed = dict(fixed or {})
    if not known.hardware.accelerator_is_cpu:  # a plan without a limit uses all the memory that it can
        fixed.setdefault("device_memory_bytes", int(known.hardware.accelerator_memory_bytes * SAFE_SHARE))

    def run(drafts) -> Found:
        found = search(config, lambda plan: evaluate(config, plan, known), requests=requests, drafts=drafts, fixed=fixed)
        return found if "retain_policy" in fixed else _evicting(found)

    measured = tuple(name for name in known.calibration.acceptance if head or described(name)[0].given != "draft_head")
    if "draft" in fixed:
        return run((fixed["draft"], *(name for name in measured if name == f"{fixed['draft']}_tree")))
    if _asks_for_a_draft(fixed):
        return run(tuple(dict.fromkeys((*measured, *_unmeasured(), *(_given("draft_head") if head else ())))))
    if known.calibration.measured:
        return _guarded(run(("none", *measured)))
    found = run(("none",))
    if found.best.plan.flow.all_resident:
        return found
    return _guarded(run(("none", *_unmeasured())))


def _unmeasured() -> tuple[str, ...]:
    """Drafts to consider without a measurement."""
    return tuple(name for name in DRAFTS if DRAFTS.description(name).tried_unmeasured)


def _given(name: str) -> tuple[str, ...]:
    """Drafts that need this argument of Engine."""
    return tuple(draft for draft in DRAFTS if DRAFTS.description(draft).given == name)


def _asks_for_a_draft(fixed: dict) -> bool:
    """Whether a field that is given has no effect without a draft."""
    policy = fixed.get("retain_policy")
    by_draft = policy is not None and RETAIN_POLICIES.description(policy).by_draft
    return by_draft or fixed.get("prefetch") == "draft" or any(fixed.get(field) for field in SOME_DRAFTS_USE)


def _evicting(found: Found) -> Found:
    """With the order of eviction that sent the fewest bytes of all with such a draft, and without one (docs/benchmarks/ideas)."""

    def settled(choice: Choice) -> Choice:
        plan = choice.plan
        policy = "drafted" if plan.drafting.gated else "expected"
        return choice._replace(plan=plan.replace(retain_policy=policy)) if plan.retain else choice

    return found._replace(best=settled(found.best), runner_up=found.runner_up and settled(found.runner_up))


def _guarded(found: Found) -> Found:
    """With an adaptive length if the plan drafts a chain: it follows the acceptance of the job, down to no draft."""
    if not found.best.plan.drafting.drafts or found.best.plan.draft_tree_top_k:
        return found
    return found._replace(best=found.best._replace(plan=found.best.plan.replace(guard=True)))


def make_plan(
    model: Model, hardware: Hardware | None = None, workload: Workload | None = None, *, requests: int = REQUESTS
) -> Plan:
    """The plan that is predicted to be the fastest for a loaded model.

    hardware: None for this machine, measured now or before. workload: None for the default one. Raises PlanError if none fits.
    """
    own = hardware is None
    known = Knowledge(
        hardware=probe() if own else hardware,
        workload=workload or Workload(prompt_tokens=min(512, model.config.max_positions // 2)),
        operators=cached_profile(model.config, model.dtype) if own else None,
    )
    fixed = {"dtype": model.dtype}
    return choose(model.config, known, requests=requests, fixed=fixed).best.plan
