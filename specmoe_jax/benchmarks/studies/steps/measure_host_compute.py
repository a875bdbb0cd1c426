"""Speed of the flows on a machine whose accelerator is the CPU; run by hand:

    python -m specmoe_jax.benchmarks.studies.steps.measure_host_compute

A random model of real proportions (hidden 1024, 8 layers, 32 experts x 512, top-8); steps of all flows in turn, medians.
"""

import argparse
import statistics

import numpy as np

import specmoe_jax as sm
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.model import random_model

SHAPE = ModelConfig(
    family="mixtral",
    vocab_size=8192,
    hidden_size=1024,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    expert_hidden=512,
    num_experts=32,
    experts_per_token=8,
    max_positions=512,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie_embeddings=False,
    sliding_window=None,
    eos_token_ids=(),
)
FLOWS = ("resident", "host_compute", "on_demand")
ROUNDS, PROMPT = 24, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    model = random_model(SHAPE, dtype=options.dtype)
    for batch in (1, 4, 16):
        seconds = {name: statistics.median(found) for name, found in timed(model, batch).items()}
        shown = ", ".join(f"{name} {batch / s:.1f} ({seconds['resident'] / s:.2f})" for name, s in seconds.items())
        print(f"{options.dtype}, batch {batch}: tokens/s (of resident's) {shown}", flush=True)


def timed(model: sm.Model, batch: int) -> dict[str, list[float]]:
    """Seconds of steps, by flow."""
    prompts = np.random.default_rng(0).integers(SHAPE.vocab_size, size=(batch, PROMPT)).tolist()
    params = sm.SamplingParams(max_new_tokens=ROUNDS + 4, ignore_eos=True)
    plan = sm.Plan(preset="probe", batch_size=batch).replace(dtype=model.dtype)
    engines = {name: sm.Engine(model, plan.replace(expert_flow=name)) for name in FLOWS}
    states, found = {name: engine.init(prompts, params) for name, engine in engines.items()}, {name: [] for name in FLOWS}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            states[name], info = engine.step(states[name])
            found[name].append(info.step_s)
    return {name: seconds[2:] for name, seconds in found.items()}


if __name__ == "__main__":
    main()
