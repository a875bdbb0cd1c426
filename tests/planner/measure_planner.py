"""How wrong the planner is on this machine: errors over plans unseen in fitting, and its choices against a measured sweep.

    python tests/planner/measure_planner.py errors --output=errors.json
    python tests/planner/measure_planner.py choices --output=choices.json

On idle cores only. The bundled model; link rates are emulated. The last line is one JSON document.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import statistics
import sys
import time
from typing import NamedTuple

import jax

import specmoe_jax
import specmoe_jax as sm
from specmoe_jax.cache_files import cache_folder
from specmoe_jax.checkpoints.eagle import bundled_head, load_head
from specmoe_jax.config import Plan
from specmoe_jax.engine.calibrate import calibrate
from specmoe_jax.engine.planning import Job, Knowledge, choose, describe, evaluate, job_of, know
from specmoe_jax.engine.profiling import profile
from specmoe_jax.engine.state import StepInfo
from specmoe_jax.planner.operators import as_table
from specmoe_jax.planner.probe import probe
from specmoe_jax.planner.search import tree
from specmoe_jax.presets import PRESETS, preset

ROUNDS = 3  # of every plan, in turn with those of the profile, because the machine's speed changes; the least disturbed counts
STEPS, SETTLE, BUDGET_S = 24, 3, 1.5  # of a plan in a round; the first ones fill draft sets and are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "choices"])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--settings", type=int, nargs="*", default=range(len(SETTINGS)), help="of the choices, by number; default all"
    )
    parser.add_argument("--fresh", action="store_true", help="profile machine and operators again")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    model, texts = sm.load_model("demo"), held_out()
    probe(fresh=args.fresh)
    calibration = calibrate(model, texts[3::7], sm.SamplingParams(), head=load_head(bundled_head("demo"), model))
    texts = [text for i, text in enumerate(texts) if i % 7 != 3]  # what is measured was not seen
    rounds = Rounds(model, unseen_plans(model.config), texts)
    operators = profile(model.config, fresh=args.fresh, progress=True, on_round=rounds.run if args.what == "errors" else int)
    print(as_table(operators), file=sys.stderr)
    known = know(model.config, "float32", model.path, Job(prompt_tokens=40, new_tokens=32))
    known = known._replace(operators=operators, calibration=calibration)
    print(calibration, file=sys.stderr, flush=True)
    document = errors(model, rounds, known) if args.what == "errors" else choices(model, texts, known, list(args.settings))
    document["calibration"] = calibration.to_dict()
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def held_out() -> list[str]:
    path = pathlib.Path(specmoe_jax.__file__).parent / "checkpoints" / "demo" / "held_out.txt"
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(texts)  # neighbours are of one book, and choose alike
    return texts


# Errors.


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
        draft_s = statistics.median(info.draft_s for info in infos)
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
        drafted = f"{fine.draft_s / draft_s:6.2f}" if plan.draft != "none" else "     -"
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
    return statistics.median(info.draft_s + info.verify_s + info.commit_s for info in infos)


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


# Choices.


class Setting(NamedTuple):
    """slots: experts that the accelerator has room for beside the rest, None for all. prompt_tokens: of each prompt, about."""

    requests: int
    link_bytes_per_s: float | None
    slots: int | None
    prompt_tokens: int = 40
    new_tokens: int = 32


SETTINGS = (
    Setting(1, None, None),
    Setting(8, None, None),
    Setting(32, None, None),
    Setting(1, 1e8, 24),
    Setting(4, 1e8, 24),
    Setting(4, 2e9, 40),
    Setting(16, 4e8, 40),
    Setting(16, None, 40, prompt_tokens=200),
    Setting(8, 1e9, 24, prompt_tokens=300),
    Setting(32, 5e8, 34, new_tokens=64),
)
SHORT, FINALISTS, FINALS = 12, 5, 5  # new tokens of the first look; how many of the best run in full, and how often
LONG_S = 40.0  # a setting that took so long is one that its link binds, and needs no more than two runs of each


def sweep_plans(config, requests: int, fixed: dict) -> list[Plan]:
    """Every flow, kind of draft, what is kept, and smaller batches; those that do not hold or fit are left out by `choices`."""
    resident, streaming, specmoe = (preset(name, config) for name in ("resident", "streaming", "specmoe"))
    plans = [preset(name, config) for name in PRESETS if name != "overlap"] + [streaming.replace(micro_batches=2)]
    for draft, length in (("ngram", 2), ("ngram", 4), ("eagle", 2), ("eagle", 4)):
        plans += [flow.replace(draft=draft, draft_length=length) for flow in (resident, streaming)]
        plans += [preset("on_demand", config).replace(draft=draft, draft_length=length, retain=True)]
    for flow, depth in itertools.product((resident, streaming, preset("on_demand", config).replace(retain=True)), (2, 4)):
        plans.append(flow.replace(draft="eagle", **tree(depth)))
    for experts, length in itertools.product((2, 4, 6), (2, 4)):
        plans.append(specmoe.replace(draft_experts=experts, draft_length=length, retain=True, prefetch="draft"))
        plans.append(specmoe.replace(draft_experts=experts, draft_length=length, retain=True))
    found = [plan.replace(batch_size=requests) for plan in plans]
    for rows in sorted({requests, max(requests // 2, 1), max(requests // 4, 1)}):
        kept = [preset("on_demand", config).replace(retain=True)]
        kept += [preset("caching", config).replace(cached_experts=n, retain=True) for n in (2, 4, 6, 8)]
        found += [plan.replace(batch_size=rows) for plan in (*kept, resident)]
    return list(dict.fromkeys(plan.replace(**fixed) for plan in found))


def choices(model, texts: list[str], known: Knowledge, settings: list[int]) -> dict:
    rows = [choice(model, texts, known, SETTINGS[number]) for number in settings]
    within = sum(row["share"] >= 0.95 for row in rows)
    return {"settings": len(rows), "within_5_percent": within, "rows": rows}


def choice(model, texts: list[str], known: Knowledge, setting: Setting) -> dict:
    config, fixed = model.config, {"dtype": "float32"}
    prompts = prompts_of(model, texts, setting)
    job = job_of(model.tokenizer, prompts, [setting.new_tokens])
    at = dataclasses.replace(known.workload, prompt_tokens=job.prompt_tokens, new_tokens=job.new_tokens)
    known = known._replace(workload=at)
    if setting.link_bytes_per_s:
        fixed["link_bytes_per_s"] = setting.link_bytes_per_s
    if setting.slots:
        beside = evaluate(config, preset("on_demand", config).replace(batch_size=setting.requests), known).account
        fixed["device_memory_bytes"] = beside.accelerator_bytes + (setting.slots - beside.num_slots) * beside.expert_bytes
    start_s = time.perf_counter()
    found = choose(config, known, requests=setting.requests, fixed=fixed, head=True)
    search_s = time.perf_counter() - start_s
    own = found.best.plan
    engines, first = {}, {}
    for plan in dict.fromkeys((own, own.replace(guard=False), *sweep_plans(config, setting.requests, fixed))):
        try:
            engine = sm.Engine(model, plan, draft_head=head_of(model, plan))
            first[plan] = speed(engine, prompts, SHORT)
            engines[plan] = engine
        except sm.PlanError:
            continue
    presets = [plan for plan in first if plan == preset(plan.preset, config).replace(batch_size=setting.requests, **fixed)]
    finalists = [*sorted(first, key=first.get, reverse=True)[:FINALISTS], own, max(presets, key=first.get)]
    speeds: dict[Plan, list[float]] = {plan: [] for plan in dict.fromkeys(finalists)}
    for number in range(FINALS):
        if number >= 2 and time.perf_counter() - start_s > LONG_S:
            break
        for plan, seen in speeds.items():
            seen.append(speed(engines[plan], prompts, setting.new_tokens))
    middle = {plan: max(seen) for plan, seen in speeds.items()}  # the least disturbed run
    best = max(middle, key=middle.get)
    best_preset = max((plan for plan in presets if plan in middle), key=middle.get)
    row = {
        "setting": setting._asdict(),
        "chosen": describe(own),
        "best": describe(best),
        "best_preset": describe(best_preset),
        "share": middle[own] / middle[best],
        "of_preset": middle[own] / middle[best_preset],
        "predicted": found.best.tokens_per_s,
        "search_s": search_s,
        "tried": found.tried,
        "measured": len(first),
        "speeds": {describe(plan): [seen, evaluate_speed(config, plan, known)] for plan, seen in speeds.items()},
        "first": {describe(plan): [seen, evaluate_speed(config, plan, known)] for plan, seen in first.items()},
    }
    lines = [f"{row['share']:.2f}  of preset {row['of_preset']:.2f}  {setting}"]
    lines += [f"{name:12} {row[name]}" for name in ("chosen", "predicted", "best", "best_preset", "measured", "search_s")]
    print("\n".join(lines), file=sys.stderr, flush=True)
    for name, (seen, predicted) in row["speeds"].items():
        print(f"      {max(seen):8.0f}  predicted {predicted:8.0f}  {name}", file=sys.stderr, flush=True)
    return row


def prompts_of(model, texts: list[str], setting: Setting) -> list[list[int]]:
    """Token ids of one text after the other until each prompt is long enough."""
    ids = itertools.cycle(model.tokenizer.encode(text) for text in texts)
    found = []
    for _ in range(setting.requests):
        prompt: list[int] = []
        while len(prompt) < 0.8 * setting.prompt_tokens:
            prompt += next(ids)
        found.append(prompt[: round(1.5 * setting.prompt_tokens)])
    return found


def speed(engine: sm.Engine, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens/s of the decoding."""
    before = engine.stats()
    engine.generate(prompts, sm.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    after = engine.stats()
    return (after["new_tokens"] - before["new_tokens"]) / (after["decode_s"] - before["decode_s"])


def evaluate_speed(config, plan: Plan, known: Knowledge) -> float:
    try:
        prediction = evaluate(config, plan, known)
        return prediction.tokens_per_s / prediction.stragglers
    except sm.PlanError:
        return float("nan")


def head_of(model, plan: Plan):
    return load_head(bundled_head("demo"), model) if plan.draft == "eagle" else None


if __name__ == "__main__":
    main()
