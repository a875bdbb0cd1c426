"""The planner's choices against a measured sweep (measure_planner.py choices)."""

import dataclasses
import itertools
import sys
import time
from typing import Any, NamedTuple

import specmoe_jax as sm
from specmoe_jax.autotune.choose import Knowledge, choose, describe, evaluate, job_of
from specmoe_jax.benchmarks.studies.planner_heads import head_of
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import PRESETS, preset
from specmoe_jax.planner.drafts.search_starts import tree


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
    for experts, more in itertools.product(
        (4, 6), ({"guard": True}, {"draft_stop": "union"}, {"draft_stop": "union", "draft_top_k": 3})
    ):
        plans.append(specmoe.replace(draft_experts=experts, draft_length=4, retain=True, retain_policy="drafted", **more))
    found = [plan.replace(batch_size=requests) for plan in plans]
    for rows in sorted({requests, max(requests // 2, 1), max(requests // 4, 1)}):
        kept = [preset("on_demand", config).replace(retain=True, retain_policy="expected")]
        kept += [preset("caching", config).replace(cached_experts=n, retain=True, retain_policy="expected") for n in (2, 4, 6, 8)]
        on_host = [plan.replace(host_share=share) for plan in kept[::2] for share in (0.5, 1.0)]
        found += [plan.replace(batch_size=rows) for plan in (*kept, *on_host, resident)]
    return list(dict.fromkeys(plan.replace(**fixed) for plan in found))


def choices(model, texts: list[str], known: Knowledge, settings: list[int]) -> dict:
    rows = [choice(model, texts, known, SETTINGS[number]) for number in settings]
    within = sum(row["share"] >= 0.95 for row in rows)
    return {"settings": len(rows), "within_5_percent": within, "rows": rows}


def choice(model, texts: list[str], known: Knowledge, setting: Setting) -> dict:
    config = model.config
    fixed: dict[str, Any] = {"dtype": "float32"}
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
    engines: dict[Plan, sm.Engine] = {}
    first: dict[Plan, float] = {}
    for plan in dict.fromkeys((own, own.replace(guard=False), *sweep_plans(config, setting.requests, fixed))):
        try:
            engine = sm.Engine(model, plan, draft_head=head_of(model, plan))
            first[plan] = speed(engine, prompts, SHORT)
            engines[plan] = engine
        except sm.PlanError:
            continue
    presets = [plan for plan in first if plan == preset(plan.preset, config).replace(batch_size=setting.requests, **fixed)]
    finalists = [*sorted(first, key=first.__getitem__, reverse=True)[:FINALISTS], own, max(presets, key=first.__getitem__)]
    speeds: dict[Plan, list[float]] = {plan: [] for plan in dict.fromkeys(finalists)}
    for number in range(FINALS):
        if number >= 2 and time.perf_counter() - start_s > LONG_S:
            break
        for plan, seen in speeds.items():
            seen.append(speed(engines[plan], prompts, setting.new_tokens))
    middle = {plan: max(seen) for plan, seen in speeds.items()}  # the least disturbed run
    best = max(middle, key=middle.__getitem__)
    best_preset = max((plan for plan in presets if plan in middle), key=middle.__getitem__)
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
        return prediction.tokens_per_s / prediction.slowest_row_factor
    except sm.PlanError:
        return float("nan")
