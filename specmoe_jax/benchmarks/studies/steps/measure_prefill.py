"""Seconds of a streamed prefill by where the prompts attend: python -m specmoe_jax.benchmarks.studies.steps.measure_prefill

Whole jobs of two new tokens on a random model of Mixtral's proportions without an emulated link, interleaved; the first compiles.
"""

import statistics

import numpy as np

import specmoe_jax as sm
from specmoe_jax.benchmarks.specmoeoff import mixtral_shaped
from specmoe_jax.config.plan_fields import PREFILL_ATTENTIONS

PARAMS = sm.SamplingParams(max_new_tokens=2, ignore_eos=True)


def main() -> None:
    model, _ = mixtral_shaped()
    print("prompts, tokens, chunk: seconds of the prefill")
    for rows, tokens in ((16, 512), (8, 2048)):
        prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens)).tolist()
        for chunk in (64, 256):
            plan = sm.PRESETS["streaming"](model.config).replace(batch_size=rows, prefill_chunk=chunk)
            engines = {where: sm.Engine(model, plan.replace(prefill_attention=where)) for where in PREFILL_ATTENTIONS}
            rounds = [{where: seconds(engine, prompts) for where, engine in engines.items()} for _ in range(4)][1:]
            medians = {where: statistics.median(one[where] for one in rounds) for where in engines}
            print(f"{rows}, {tokens}, {chunk}: " + ", ".join(f"{where} {s:.2f}" for where, s in medians.items()), flush=True)


def seconds(engine: sm.Engine, prompts) -> float:
    before = engine.stats()["prefill_s"]
    engine.generate(prompts, PARAMS)
    return engine.stats()["prefill_s"] - before


if __name__ == "__main__":
    main()
