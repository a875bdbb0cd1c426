"""The cost of a step that is not arithmetic: steps of a model so small that hardly any is left; run by hand:

    python -m specmoe_jax.benchmarks.studies.steps.step_cost

Engines take turns in one process; a figure is the median of its steps. What an expert costs that is fetched is the difference
between steps that fetch all that they need and steps of the same flow that find all of it resident.
"""

import argparse
import json
import statistics
import time

import numpy as np

import specmoe_jax as sm
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.model import random_model

ROUNDS, STEPS, SETTLE, PROMPT = 5, 12, 2, 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--draft_length", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    model = random_model(shape(options.layers, options.hidden, options.experts), dtype=options.dtype)
    engines, compile_s = {}, {}
    for name, fields in plans(options).items():
        plan = sm.Plan(preset="probe", batch_size=options.batch, **fields).replace(dtype=options.dtype)
        engines[name] = sm.Engine(model, plan)
        start_s = time.perf_counter()
        steps(engines[name], model, options.batch, count=1)
        compile_s[name] = time.perf_counter() - start_s
    seen = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            seen[name] += steps(engine, model, options.batch, count=STEPS)[SETTLE:]
    found = figures(seen, options)
    for name, value in found.items():
        print(f"{name:<48}{value:>9.1f}")
    print(json.dumps({"shape": vars(options), "us": found, "first_batch_s": compile_s}))


def shape(layers: int, hidden: int, experts: int) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=512,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        expert_hidden=2 * hidden,
        num_experts=experts,
        experts_per_token=2,
        max_positions=256,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=False,
        sliding_window=None,
        eos_token_ids=(),
    )


def plans(options: argparse.Namespace) -> dict[str, dict]:
    """Fields of the plans to time, by what they show."""
    draft = {"draft": "self", "draft_length": options.draft_length, "draft_experts": options.experts // 4}
    return {
        "resident": {"expert_flow": "resident"},
        "on_demand": {},
        "on_demand, all resident": {"cached_experts": options.experts},
        "drafted": draft,
        "drafted, prefetch": draft | {"prefetch": "draft"},
        "streamed": {"expert_flow": "stream", "kv_tier": "host"},
    }


def steps(engine: sm.Engine, model: sm.Model, batch: int, *, count: int) -> list:
    """Infos of the first steps of a batch of random prompts."""
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(batch, PROMPT)).tolist()
    state, infos = engine.init(prompts, sm.SamplingParams(max_new_tokens=128, ignore_eos=True)), []
    while not state.done and len(infos) < count:
        state, info = engine.step(state)
        infos.append(info)
    return infos


def figures(seen: dict[str, list], options: argparse.Namespace) -> dict[str, float]:
    """Microseconds."""

    def median(name: str, value) -> float:
        return 1e6 * statistics.median(map(value, seen[name]))

    def step(name: str) -> float:
        return median(name, lambda info: info.step_s) / options.layers

    fetched = statistics.median(info.verify.fetched for info in seen["on_demand"]) / options.layers
    drafted = options.layers * options.draft_length
    return {
        "resident step, a layer": step("resident"),
        "on_demand step, a layer": step("on_demand"),
        "on_demand step, all resident, a layer": step("on_demand, all resident"),
        "fetching an expert": (step("on_demand") - step("on_demand, all resident")) / fetched,
        "draft, a layer and token": median("drafted", lambda info: info.draft_s) / drafted,
        "draft with prefetch, a layer and token": median("drafted, prefetch", lambda info: info.draft_s) / drafted,
        "streamed pass, a layer": step("streamed"),
    }


if __name__ == "__main__":
    main()
