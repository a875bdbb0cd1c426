"""Every kind of draft beside a cache of experts alone, at equal accelerator memory.

The measure is the self-draft with N pinned experts of every layer. Every other row keeps experts between passes in as many spare
slots as make its memory the same: what a draft takes for itself (merged experts, a head, a layer for further tokens) it takes from
the experts kept.
"""

import logging

from specmoe_jax.benchmarks.categories import accepted_by_position
from specmoe_jax.benchmarks.rounds import Case, compare, limit
from specmoe_jax.benchmarks.setting import Setting
from specmoe_jax.config.plan import Plan
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.planner.memory.memory_account import MemoryAccount
from specmoe_jax.support.errors import PlanError

LOG = logging.getLogger(__name__)


def kinds(s: Setting) -> dict:
    """Self, merged, n-gram, EAGLE, MTP at equal accelerator memory; acceptance by position. Ratios are to the cache."""
    rows = {}
    for batch in s.batches:
        for name, figures in compare(s.model, cases(s, batch), s.job(batch)).items():
            rows[f"{name} @ {batch}"] = figures | accepted_by_position(figures) | {"case": name, "batch": batch}
    return rows


def cases(s: Setting, batch: int) -> list[Case]:
    """The rows of one batch, and a line in the log for each draft that has no room in that memory."""
    measure = s.specmoe(batch, retain=True)
    budget = held(s, measure).accelerator_bytes
    others: list[tuple[str, Plan, EagleHead | MtpHead | None]] = [
        ("cache", s.plan("on_demand", batch), None),
        ("ngram", s.ngram(batch, s.length), None),
        ("merged", s.specmoe(batch, draft="merged"), None),
    ]
    for name, head in s.heads.items():
        plan = s.plan("on_demand", batch, draft=name, draft_length=s.length, synthetic_acceptance=s.acceptance)
        others.append((name, plan, head))
    found = [Case("on_demand", s.plan("on_demand", batch), "cache"), Case("self", measure, "cache")]
    for name, plan, head in others:
        try:
            found.append(Case(name, filled(s, plan, head, budget), None if name == "cache" else "cache", head))
        except PlanError as e:
            LOG.warning("%s @ %s is left out: %s", name, batch, e)
    return found


def held(s: Setting, plan: Plan, head: EagleHead | MtpHead | None = None) -> MemoryAccount:
    """The account of the job's batch."""
    config, job = s.model.config, s.job(plan.batch_size)
    ids = [s.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in job.prompts]
    positions = cache_positions(max(map(len, ids)) + limit(s.model, job), plan)
    draft = plan.drafting.memory(plan, config, head=head.config if isinstance(head, EagleHead) else None)
    return account(config, plan, batch_rows=plan.batch_size, positions=positions, draft=draft)


def filled(s: Setting, plan: Plan, head: EagleHead | MtpHead | None, budget: int) -> Plan:
    """The plan with as many spare slots for retained experts as the budget leaves."""
    used = held(s, plan, head)
    spare = (budget - used.accelerator_bytes) // used.slot_bytes
    if spare < 0:
        raise PlanError(
            f"draft={plan.drafting.name} takes the memory of {-spare} experts more than a self-draft with {s.experts} pinned experts "
            "of each layer; give more --draft_experts"
        )
    return plan.replace(retain=True, spare_slots=int(spare) or None)
