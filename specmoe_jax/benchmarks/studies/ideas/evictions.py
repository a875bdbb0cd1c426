"""Eviction policies on routing that the engine records: hit rates, the distance to Belady's optimum, and what oracles would save.

    python -m specmoe_jax.benchmarks.studies.ideas.evictions --model=demo --batches=1,4,16 --output=evictions.json
Passes of a self-draft at temperature 1 are recorded with what the draft's gates chose, and every policy is replayed on them with
room for some shares of all experts. "distance" is the part of the way from LRU to Belady. The oracles: speed over LRU of a perfect
prefetch of one layer, of Belady's eviction, and of both, for layers that compute as long as so many experts take over the link.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import app, flags

import specmoe_jax as sm
from specmoe_jax.checkpoints.loader import BUNDLED
from specmoe_jax.config.plan import Plan
from specmoe_jax.offload.host_cache_policies import least_frequently_recently_used as lfru
from specmoe_jax.offload.retain_policies import drafted_first
from specmoe_jax.planner import replay
from specmoe_jax.speculate.hot_experts.usage import count_choices

SHARES = (0.125, 0.25, 0.5)  # of all experts that are kept
LAYER = (0.5, 2.0, 8.0)  # a layer's computation in units of the time that an expert takes over the link
LENGTH = 4


class Recorded(NamedTuple):
    """Of the passes of a run, [S, L, E]: how often each expert was chosen, and how often the draft's gates had chosen it."""

    needed: np.ndarray
    drafted: np.ndarray


def record(model: sm.Model, prompts: list[str], plan: Plan, tokens: int) -> Recorded:
    needed, drafted = [], []

    def on_step(info) -> None:
        needed.append([count_choices(ids, model.config.num_experts) for ids in info.verify.routing])
        drafted.append(info.predicted)

    params = sm.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=1.0)
    sm.Engine(model, plan).generate(prompts, params, on_step=on_step)
    return Recorded(np.array(needed), np.array(drafted))


def table(recorded: Recorded, share: float) -> dict[str, dict[str, float]]:
    """Of each policy the hit rate and its part of the way from LRU to Belady."""
    capacity = int(share * recorded.needed[0].size)
    fetched = replay.replay(recorded.needed, capacity, drafted=recorded.drafted)
    fetched["drafted, lfru"] = replay.cached(recorded.needed, capacity, drafted_first(lfru), recorded.drafted)
    needed, worst, best = fetched.pop("needed"), fetched["lru"], fetched["belady"]
    return {
        name: {"hit_rate": 1 - count / needed, "distance": (worst - count) / max(worst - best, 1)}
        for name, count in fetched.items()
        if name != "on_demand"
    }


def oracles(trace: np.ndarray, share: float, layer: float) -> dict[str, float]:
    """Speed over LRU without a prefetch."""
    capacity = int(share * trace[0].size)
    lru = replay.fetches(trace, capacity, replay.HOST_CACHE_POLICIES.description("lru"))
    belady = replay.fetches(trace, capacity, replay.furthest_next_use)
    runs = {"prefetch": (lru, True), "eviction": (belady, False), "both": (belady, True)}
    base = replay.link_bound_s(lru, expert_s=1.0, layer_s=layer, ahead=False)
    took = {name: replay.link_bound_s(found, expert_s=1.0, layer_s=layer, ahead=ahead) for name, (found, ahead) in runs.items()}
    return {name: base / seconds for name, seconds in took.items()}


def texts(count: int) -> list[str]:
    lines = (BUNDLED["demo"] / "held_out.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip()]
    return [lines[i % len(lines)] for i in range(count)]


def as_text(tables: Mapping[str, Mapping]) -> str:
    lines = []
    for place, found in tables.items():
        lines.append(place)
        ranked = sorted(found["policies"].items(), key=lambda entry: -entry[1]["hit_rate"])
        lines += [f"  {name:<16} hits {row['hit_rate']:6.1%}  distance {row['distance']:6.1%}" for name, row in ranked]
        for layer, row in found["oracles"].items():
            lines.append(f"  layer = {layer} experts: " + ", ".join(f"{name} x{speed:.3f}" for name, speed in row.items()))
    return "\n".join(lines)


def main(model: str, batches: list[int], tokens: int, draft_experts: int, output: str | None) -> dict:
    loaded, tables = sm.load_model(model), {}
    for batch in batches:
        plan = sm.PRESETS["specmoe"](loaded.config).replace(
            batch_size=batch, draft_experts=draft_experts, draft_length=LENGTH, retain=True, retain_policy="drafted"
        )
        recorded = record(loaded, texts(batch), plan, tokens)
        for share in SHARES:
            tables[f"batch {batch}, room for {share:.1%} of the experts, {len(recorded.needed)} passes"] = {
                "policies": table(recorded, share),
                "oracles": {str(layer): oracles(recorded.needed, share, layer) for layer in LAYER},
            }
    if output is not None:
        pathlib.Path(output).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return tables


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", "demo", "A checkpoint.")
    _BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "Batch sizes.")
    _TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of each request.")
    _EXPERTS = flags.DEFINE_integer("draft_experts", 4, "Hot experts of a layer.")
    _OUTPUT = flags.DEFINE_string("output", None, "Where the tables go as JSON.")

    def run(_) -> None:
        batches = [int(batch) for batch in _BATCHES.value]
        print(as_text(main(_MODEL.value, batches, _TOKENS.value, _EXPERTS.value, _OUTPUT.value)))

    app.run(run)
