"""The best plan for a model on a machine as advice: with the runner-up, what it leaves unused, and what packed experts would give.

Numbers only: nothing is run, no weight is read.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.autotune.choose import Knowledge, choose, evaluate
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.plan_fields import DECODED, EXPERT_DTYPES
from specmoe_jax.models.packing.registry import LOSSLESS, is_published
from specmoe_jax.planner.search import Choice, Found
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.units import GIB

HOST_SHARE = 0.9  # of a machine's memory for experts that are on disk: a system needs some too
CPU_SHARES = (0.9, 0.7, 0.5, 0.3)  # where computation takes its memory from the same: the first that leaves enough
LITTLE = 0.1  # of an accelerator's memory: no word about it
PACKINGS = tuple(name for name in EXPERT_DTYPES if name != DECODED)  # of experts that are not packed already
COUNTS = ("cached_experts", "draft_experts")  # of a layer; the search knows powers of two and what is halfway between them


class Advised(NamedTuple):
    """requests: of the job. best and runner_up are exact plans.

    packed: by expert_dtype, the best where that is faster; LOSSLESS for a checkpoint that is converted first, which is exact too.
    """

    requests: int
    best: Choice
    runner_up: Choice | None
    packed: dict[str, Choice]
    tried: int


def advise(
    config: ModelConfig,
    known: Knowledge,
    *,
    requests: int,
    fixed: dict,
    head: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Advised:
    """fixed: fields of the plan that are given. head: whether an EAGLE head is at hand. progress: called after each search.

    Experts stay on disk where host memory does not hold them. Raises PlanError if nothing fits even so.
    """

    def search(of: ModelConfig = config, given: Knowledge = known, **more) -> Found:
        try:
            return _with_disk(of, given, requests, fixed | more, head)
        finally:
            progress()

    error, found, packed = None, None, {}
    try:
        found = search()
    except PlanError as e:
        error = e
    if found is None or not found.best.plan.flow.all_resident:
        packed = _packed(config, known, search, fixed, 0.0 if found is None else found.best.tokens_per_s)
    if found is None:
        planned = [choice for name, choice in packed.items() if name != LOSSLESS]  # of the checkpoint as it is
        if not planned:
            assert error is not None
            raise error
        best = max(planned, key=lambda choice: choice.tokens_per_s)
        return Advised(requests, best, None, packed, 0)
    return Advised(requests, filled(config, known, found.best, fixed), found.runner_up, packed, found.tried)


def searches(fixed: dict) -> int:
    """How many searches an advice takes at most."""
    return 1 + (0 if fixed.get("expert_dtype") else 1 + len(PACKINGS))


def _with_disk(config: ModelConfig, known: Knowledge, requests: int, fixed: dict, head: bool) -> Found:
    try:
        return choose(config, known, requests=requests, fixed=fixed, head=head)
    except PlanError:
        if "expert_tier" in fixed or fixed.get("expert_dtype") not in (None, DECODED):
            raise
    *shares, last = CPU_SHARES if known.hardware.accelerator_is_cpu else (HOST_SHARE,)

    def on_disk(share: float) -> Found:
        cached = min(int(known.hardware.host_memory_bytes * share), fixed.get("host_memory_bytes") or math.inf)
        memory = fixed | {"expert_tier": "disk", "host_memory_bytes": cached}
        return choose(config, known, requests=requests, fixed=memory, head=head)

    for share in shares:
        with contextlib.suppress(PlanError):
            return on_disk(share)
    return on_disk(last)


def _packed(config: ModelConfig, known: Knowledge, search: Callable[..., Found], fixed: dict, best: float) -> dict[str, Choice]:
    if fixed.get("expert_dtype") or is_published(config.experts.packing):
        return {}
    found, converted = {}, config.with_packing(LOSSLESS)
    forms = {name: (config, {"expert_dtype": name}) for name in PACKINGS if not fixed.get("expert_tier")}
    if fixed.get("dtype") == "bfloat16":
        forms = {LOSSLESS: (converted, {})} | forms
    for name, (of, fields) in forms.items():
        given = known._replace(is_mapped=name == LOSSLESS)  # others are packed when they are loaded, into memory
        try:
            choice = filled(of, given, search(of, given, **fields).best, fixed)
        except PlanError:  # it does not fit either, or is not for this model
            continue
        if choice.tokens_per_s > best:
            found[name] = choice
    return found


def filled(config: ModelConfig, known: Knowledge, choice: Choice, fixed: dict) -> Choice:
    """The choice with as many resident experts as fit, where that is predicted to be faster."""
    for field in COUNTS:
        if isinstance(getattr(choice.plan, field), int) and field not in fixed:
            choice = _most(config, known, choice, field)
    return choice


def _most(config: ModelConfig, known: Knowledge, choice: Choice, field: str) -> Choice:
    """The largest count that fits, by bisection."""
    low, high, best = getattr(choice.plan, field), config.num_experts, choice
    while high - low > 1:
        middle = (low + high) // 2
        found = _evaluated(config, known, choice, choice.plan.replace(**{field: middle}))
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best if best.tokens_per_s > choice.tokens_per_s else choice


def _evaluated(config: ModelConfig, known: Knowledge, choice: Choice, plan: Plan) -> Choice | None:
    try:
        prediction = evaluate(config, plan, known)
    except PlanError:
        return None
    share = choice.tokens_per_s / choice.prediction.tokens_per_s  # of a job, whose batches do not change
    return Choice(plan, prediction, prediction.tokens_per_s * share)


def unused(config: ModelConfig, known: Knowledge, choice: Choice) -> str | None:
    """What of the accelerator's memory the plan leaves, and why; None where that is little."""
    has, own, plan = known.hardware.accelerator_memory_bytes, choice.prediction.account, choice.plan
    left = has - own.accelerator_bytes
    if left < has * LITTLE:
        return None
    if plan.flow.all_resident:
        why = "every expert is there; more requests at a time have room"
    elif plan.flow.streams_layers:
        why = f"a whole layer of experts takes {config.num_experts * own.expert_bytes / GIB:.2g}"
    elif plan.retain or (kept := _evaluated(config, known, choice, plan.replace(retain=True))) is None:
        why = f"one more expert of each layer takes {config.num_moe_layers * own.expert_bytes / GIB:.2g}"
    elif kept.tokens_per_s > choice.tokens_per_s:
        why = f"retain keeps experts there, {kept.tokens_per_s / choice.tokens_per_s:.2f} times as fast"
    else:
        why = f"experts kept there would not help while the {choice.prediction.binding} is the bottleneck"
    return f"{left / GIB:.0f} of {has / GIB:.0f} GiB: {why}"
