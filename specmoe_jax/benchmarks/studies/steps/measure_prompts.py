"""Bytes and seconds of a prefill, bundled model; run by hand: python -m specmoe_jax.benchmarks.studies.steps.measure_prompts

Prompts of 512 tokens on an emulated link, and without one prompts that begin alike beside others that do not. Interleaved rounds.
"""

import pathlib
import statistics

import specmoe_jax as sm

DEMO = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo"
PARAMS = sm.SamplingParams(max_new_tokens=2, ignore_eos=True)
ROUNDS, TOKENS, STRIDE, HEADER, LINK_BYTES_PER_S = 3, 512, 256, 448, 20e6


def main() -> None:
    model = sm.load_model("demo")
    text = model.tokenizer.encode((DEMO / "held_out.txt").read_text(encoding="utf-8"))
    apart = [text[start : start + TOKENS] for start in range(0, 8 * STRIDE, STRIDE)]
    alike = [text[:HEADER] + prompt[HEADER:] for prompt in apart]
    presets = {name: sm.PRESETS[name](model.config) for name in ("resident", "on_demand", "caching", "specmoe")}
    cases = {
        f"{name}, 2 prompts, emulated link": (plan.replace(batch_size=2, link_bytes_per_s=LINK_BYTES_PER_S), apart[:2])
        for name, plan in presets.items()
        if not plan.flow.all_resident
    }
    for name in ("resident", "on_demand"):
        cases[f"{name}, 8 prompts"] = (presets[name].replace(batch_size=8), apart)
        cases[f"{name}, 8 prompts that begin alike"] = (presets[name].replace(batch_size=8), alike)
    engines = {name: sm.Engine(model, plan) for name, (plan, _) in cases.items()}
    seen: dict[str, list] = {name: [] for name in cases}
    for _ in range(ROUNDS + 1):
        for name, (_, prompts) in cases.items():
            seen[name].append(prefill(engines[name], prompts))
    for name, rounds in seen.items():
        seconds, sent = zip(*rounds[1:], strict=True)  # the first compiles
        print(f"{name:<44}{statistics.median(sent) / 1e6:>8.1f} MB{statistics.median(seconds):>8.2f} s")


def prefill(engine: sm.Engine, prompts) -> tuple[float, int]:
    """-> seconds and bytes over the link."""
    before = engine.stats()
    engine.generate(prompts, PARAMS)
    after = engine.stats()
    return tuple(after[name] - before[name] for name in ("prefill_s", "prefill_link_bytes"))


if __name__ == "__main__":
    main()
