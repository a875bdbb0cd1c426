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

import jax

import specmoe_jax
import specmoe_jax as sm
from specmoe_jax.cache_files import cache_folder
from specmoe_jax.config import Plan, preset
from specmoe_jax.engine.calibrate import calibrate
from specmoe_jax.engine.planning import Job, Knowledge, choose, describe, evaluate, know
from specmoe_jax.engine.profiling import profile
from specmoe_jax.planner.operators import as_table
from specmoe_jax.planner.probe import probe

STEPS, SETTLE = 14, 3  # of a plan; the first ones fill draft sets and are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "choices"])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--fresh", action="store_true", help="profile machine and operators again")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    model, texts = sm.load_model("demo"), held_out()
    probe(fresh=args.fresh)
    operators = profile(model.config, fresh=args.fresh)
    print(as_table(operators), file=sys.stderr)
    calibration = calibrate(model, texts[3::7], sm.SamplingParams())
    texts = [text for i, text in enumerate(texts) if i % 7 != 3]  # what is measured was not seen
    known = know(model.config, "float32", model.path, Job(prompt_tokens=40, new_tokens=32))
    known = known._replace(operators=operators, calibration=calibration)
    print(calibration, file=sys.stderr, flush=True)
    document = (errors if args.what == "errors" else choices)(model, texts, known)
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
        plans += [preset("on_demand", config).replace(**base), preset("specmoe", config).replace(draft_length=3, **base)]
        plans += [preset("caching", config).replace(**base | {"cached_experts": 6})]
        plans += [preset("streaming", config).replace(**base)]
        if link is None:
            plans += [preset("resident", config).replace(batch_size=rows)]
            plans += [preset("resident", config).replace(batch_size=rows, draft="ngram", draft_length=2)]
            plans += [preset("streaming", config).replace(batch_size=rows, micro_batches=2, draft="ngram", draft_length=3)]
        else:
            plans += [preset("specmoe", config).replace(draft_length=6, draft_experts=8, prefetch="draft", **base)]
    return plans


def errors(model, texts: list[str], known: Knowledge) -> dict:
    rows = []
    for plan in unseen_plans(model.config):
        step_s, draft_s, context = measured_step(model, plan, texts)
        at = dataclasses.replace(known.workload, prompt_tokens=max(round(context) - 1, 1), new_tokens=2)
        fine = evaluate(model.config, plan, known._replace(workload=at))
        rough = evaluate(model.config, plan, known._replace(workload=at, operators=None))
        row = {"plan": describe(plan), "link": plan.link_bytes_per_s, "step_s": step_s, "draft_s": draft_s, "context": context}
        row |= {
            "simulator_s": fine.iteration_s,
            "naive_s": fine.naive_s,
            "draft_predicted_s": fine.draft_s,
            "rates_s": rough.iteration_s,
        }
        rows.append(row)
        ratios = " ".join(f"{row[name] / step_s:6.2f}" for name in ("simulator_s", "naive_s", "rates_s"))
        drafted = f"{fine.draft_s / draft_s:6.2f}" if plan.draft != "none" else "     -"
        print(f"{step_s * 1e3:9.2f} ms  {ratios}  draft {drafted}  {row['plan']} link {row['link']}", file=sys.stderr, flush=True)
    summary = {
        name: spread([abs(row[f"{name}_s"] / row["step_s"] - 1) for row in rows]) for name in ("simulator", "naive", "rates")
    }
    drafts = [row for row in rows if row["draft_predicted_s"] > 0]
    summary["draft"] = spread([abs(row["draft_predicted_s"] / row["draft_s"] - 1) for row in drafts])
    print(json.dumps(summary, indent=1), file=sys.stderr)
    return {"plans": len(rows), "summary": summary, "rows": rows}


def spread(values: list[float]) -> dict:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p90": ordered[int(0.9 * (len(ordered) - 1))], "count": len(ordered)}


def measured_step(model, plan: Plan, texts: list[str]) -> tuple[float, float, float]:
    """Medians of a step's and its draft's seconds, and the mean context of a row meanwhile."""
    engine = sm.Engine(model, plan)
    prompts = [texts[i % len(texts)] for i in range(plan.batch_size)]
    state = engine.init(prompts, sm.SamplingParams(max_new_tokens=200, ignore_eos=True))
    steps, drafts, contexts = [], [], []
    for number in range(STEPS):
        state, info = engine.step(state)
        if number >= SETTLE:
            steps.append(info.draft_s + info.verify_s + info.commit_s)
            drafts.append(info.draft_s)
            contexts.append(info.context / max(info.active.sum(), 1))
    return statistics.median(steps), statistics.median(drafts), statistics.mean(contexts)


# Choices.

SETTINGS = [  # requests, link rate, slots that the accelerator has room for beside the rest (None: all)
    (1, None, None),
    (8, None, None),
    (32, None, None),
    (1, 1e8, 24),
    (4, 1e8, 24),
    (16, 1e8, 24),
    (16, 4e8, 40),
    (4, 2e9, 40),
    (16, 3e7, 40),
    (32, 1e8, 40),
]


def sweep_plans(config, requests: int, fixed: dict) -> list[Plan]:
    """What is measured in a setting; those that do not hold or fit are left out by `choices`."""
    plans = [preset("resident", config), preset("on_demand", config), preset("on_demand", config).replace(retain=True)]
    plans += [preset("caching", config).replace(cached_experts=n, retain=True) for n in (2, 6)] + [preset("streaming", config)]
    plans += [preset("resident", config).replace(draft="ngram", draft_length=3)]
    for experts, length in itertools.product((2, 4, 6), (2, 4)):
        plans.append(preset("specmoe", config).replace(draft_experts=experts, draft_length=length, retain=True, prefetch="draft"))
    return [plan.replace(batch_size=requests, **fixed) for plan in plans]


def choices(model, texts: list[str], known: Knowledge) -> dict:
    rows = []
    for requests, link, slots in SETTINGS:
        fixed = {"dtype": "float32"} | ({"link_bytes_per_s": link} if link else {})
        if slots:
            beside = evaluate(model.config, preset("on_demand", model.config).replace(batch_size=requests), known).account
            fixed["device_memory_bytes"] = beside.accelerator_bytes + (slots - beside.num_slots) * beside.expert_bytes
        start_s = time.perf_counter()
        found = choose(model.config, known, requests=requests, fixed=fixed)
        search_s = time.perf_counter() - start_s
        speeds = {}
        for plan in dict.fromkeys([found.best.plan, *sweep_plans(model.config, requests, fixed)]):
            speed = speed_of(model, plan, texts, requests)
            if speed is not None:
                speeds[describe(plan)] = max(speed, speeds.get(describe(plan), 0.0))
        own = describe(found.best.plan)
        best = max(speeds, key=speeds.get)
        row = {
            "setting": [requests, link, slots],
            "chosen": own,
            "best": best,
            "share": speeds[own] / speeds[best],
            "speeds": speeds,
        }
        rows.append(row | {"predicted": found.best.tokens_per_s, "search_s": search_s, "tried": found.tried})
        print(
            f"{row['share']:.2f}  {row['setting']}  chosen {own} {speeds[own]:.0f} (predicted {found.best.tokens_per_s:.0f})"
            f"  best {best} {speeds[best]:.0f}  search {search_s:.2f} s",
            file=sys.stderr,
            flush=True,
        )
    within = sum(row["share"] >= 0.95 for row in rows)
    return {"settings": len(rows), "within_5_percent": within, "rows": rows}


def speed_of(model, plan: Plan, texts: list[str], requests: int) -> float | None:
    """Tokens/s of the decoding, the better of two runs of an engine; None for a plan that does not hold or fit."""
    prompts, params = texts[:requests], sm.SamplingParams(max_new_tokens=32, ignore_eos=True)
    try:
        engine = sm.Engine(model, plan)
        speeds = []
        for _ in range(2):  # the first one settles
            before = engine.stats()
            engine.generate(prompts, params)
            after = engine.stats()
            speeds.append((after["new_tokens"] - before["new_tokens"]) / (after["decode_s"] - before["decode_s"]))
    except sm.PlanError:
        return None
    return max(speeds)


if __name__ == "__main__":
    main()
