"""The planner's errors over plans unseen in fitting (measure_planner.py errors)."""

import dataclasses
import itertools
import statistics
import sys
import time

import specmoe_jax as sm
from specmoe_jax.autotune.choose import Knowledge, describe, evaluate
from specmoe_jax.benchmarks.studies.planner_heads import head_of
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import preset
from specmoe_jax.engine.state import StepInfo
from specmoe_jax.planner.drafts.search_starts import tree

ROUNDS = 3  # of every plan, in turn with those of the profile, because the machine's speed changes; the least disturbed counts
STEPS, SETTLE, BUDGET_S = 24, 3, 1.5  # of a plan in a round; the first ones fill draft sets and are not counted


def unseen_plans(config) -> list[Plan]:
    """Batches, lengths and link rates at which no operator was measured."""
    plans = []
    for rows, link in itertools.product((2, 8, 24, 40), (None, 1e8)):
        base = {"batch_size": rows, "link_bytes_per_s": link}
        resident, streaming = preset("resident", config).replace(batch_size=rows), preset("streaming", config).replace(**base)
        plans += [preset("on_demand", config).replace(**base), preset("specmoe", config).replace(draft_length=3, **base)]
        plans += [preset("caching", config).replace(**base | {"cached_experts": 6})]
        plans += [streaming]
        if link is None:
            plans += [resident, resident.replace(draft="ngram", draft_length=2), resident.replace(draft="eagle", draft_length=3)]
            plans += [resident.replace(draft="eagle", **tree(3))]
            plans += [streaming.replace(micro_batches=2, draft="ngram", draft_length=3)]
            plans += [streaming.replace(micro_batches=2, draft="eagle", draft_length=4, preset="specmoeoff")]
        else:
            plans += [preset("specmoe", config).replace(draft_length=6, draft_experts=8, prefetch="draft", **base)]
    return plans


class Rounds:
    """The plans and what was measured of each so far."""

    def __init__(self, model, plans: list[Plan], texts: list[str]):
        self.plans, self.seen = plans, [[] for _ in plans]
        self._model, self._texts = model, texts

    def run(self) -> None:
        for plan, seen in zip(self.plans, self.seen, strict=True):
            seen.append(steps_of(self._model, plan, self._texts))


def errors(model, rounds: Rounds, known: Knowledge) -> dict:
    while len(rounds.seen[0]) < ROUNDS:  # the profile was known already
        rounds.run()
    rows = []
    for plan, seen in zip(rounds.plans, rounds.seen, strict=True):
        infos = min(seen, key=median_step)
        step_s = median_step(infos)
        draft_s = statistics.median(info.drafting_s for info in infos)
        context = statistics.mean(info.context / max(info.active.sum(), 1) for info in infos)
        at = dataclasses.replace(known.workload, prompt_tokens=max(round(context) - 1, 1), new_tokens=2)
        fine = evaluate(model.config, plan, known._replace(workload=at))
        rough = evaluate(model.config, plan, known._replace(workload=at, operators=None))
        row = {"plan": describe(plan), "link": plan.link_bytes_per_s, "step_s": step_s, "draft_s": draft_s, "context": context}
        row |= {
            "simulator_s": fine.iteration_s,
            "naive_s": fine.naive_s,
            "draft_predicted_s": fine.draft_s,
            "rates_s": rough.iteration_s,
            "misses": statistics.mean(info.verify.misses for info in infos) / model.config.num_moe_layers,
        }
        rows.append(row)
        ratios = " ".join(f"{row[name] / step_s:6.2f}" for name in ("simulator_s", "naive_s", "rates_s"))
        drafted = f"{fine.draft_s / draft_s:6.2f}" if plan.drafting.drafts else "     -"
        print(f"{step_s * 1e3:9.2f} ms  {ratios}  draft {drafted}  {row['plan']} link {row['link']}", file=sys.stderr, flush=True)
    summary = {
        f"{name} {kind}": spread([abs(row[f"{name}_s"] / row["step_s"] - 1) for row in rows if chosen(row)])
        for name in ("simulator", "naive", "rates")
        for kind, chosen in (("all", lambda _: True), ("linked", lambda row: row["link"]), ("not", lambda row: not row["link"]))
    }
    drafts = [row for row in rows if row["draft_predicted_s"] > 0]
    summary["draft"] = spread([abs(row["draft_predicted_s"] / row["draft_s"] - 1) for row in drafts])
    for name, found in summary.items():
        print(f"{name:16} {found}", file=sys.stderr)
    return {"plans": len(rows), "summary": summary, "rows": rows}


def median_step(infos: list[StepInfo]) -> float:
    return statistics.median(info.step_s for info in infos)


def spread(values: list[float]) -> dict:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p90": ordered[int(0.9 * (len(ordered) - 1))], "count": len(ordered)}


def steps_of(model, plan: Plan, texts: list[str]) -> list[StepInfo]:
    """Some steps of a new engine."""
    engine = sm.Engine(model, plan, draft_head=head_of(model, plan))
    prompts = [texts[i % len(texts)] for i in range(plan.batch_size)]
    state, infos = engine.init(prompts, sm.SamplingParams(max_new_tokens=200, ignore_eos=True)), []
    start_s = time.perf_counter()
    while len(infos) < STEPS and (len(infos) < 2 * SETTLE or time.perf_counter() - start_s < BUDGET_S):
        state, info = engine.step(state)
        infos.append(info)
    return infos[SETTLE:]
