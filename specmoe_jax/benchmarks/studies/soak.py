"""Serves a fixed queue of requests again and again: memory stays, nothing compiles, throughput stays.

Not a test that pytest collects (half an hour); run it by hand:
    python -m specmoe_jax.benchmarks.studies.soak --minutes=30
The last line is one JSON document. Throughput is also given per second of processor time, which other work on the same
cores disturbs less than the wall clock.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import specmoe_jax as sm

HELD_OUT = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo" / "held_out.txt"


def resident_bytes() -> int:
    """What of this process is in memory now (not the peak)."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def queue(count: int) -> tuple[list[str], list[sm.SamplingParams]]:
    """Prompts and limits of many lengths; every third request samples, some have stop strings."""
    texts = [line for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [texts[i % len(texts)][: 20 + i % 60] for i in range(count)]
    params = [
        sm.SamplingParams(
            max_new_tokens=16 + i % 48, temperature=0.8 if i % 3 == 0 else 0.0, stop=("\n\n",) if i % 5 == 0 else (), seed=i
        )
        for i in range(count)
    ]
    return prompts, params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--warm_up_rounds", type=int, default=5)
    args = parser.parse_args()
    model = sm.load_model("demo")
    engine = sm.Engine(model, sm.PRESETS["specmoe"](model.config).replace(batch_size=args.batch_size, prefetch="draft"))
    prompts, params = queue(args.requests)
    rounds, first, compiled = [], None, None
    end = time.monotonic() + args.minutes * 60
    while time.monotonic() < end or len(rounds) < args.warm_up_rounds + 2:
        wall, cpu = time.monotonic(), time.process_time()
        tokens = [completion.token_ids for completion in engine.generate(prompts, params)]
        wall_s, cpu_s = time.monotonic() - wall, time.process_time() - cpu
        first = first or tokens
        greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        assert all(tokens[i] == first[i] for i in greedy), "a greedy request was answered otherwise"
        if len(rounds) == args.warm_up_rounds:
            compiled = engine.stats()["compile_s"]
        count = sum(map(len, tokens))
        rounds.append({"memory_bytes": resident_bytes(), "tokens_per_s": count / wall_s, "tokens_per_cpu_s": count / cpu_s})
    assert compiled is not None  # there were more rounds than those to warm up
    print(json.dumps(report(rounds[args.warm_up_rounds :], engine.stats(), compiled), indent=1))


def report(rounds: list[dict], stats: dict, compile_s: float) -> dict:
    """The first and last tenth of the rounds after warm-up against each other."""
    tenth = max(len(rounds) // 10, 1)
    memory = [r["memory_bytes"] for r in rounds]
    figures = {
        "rounds": len(rounds),
        "new_tokens": stats["new_tokens"],
        "compilations_after_warmup": stats["compilations_after_warmup"],
        "compile_s_after_warm_up_rounds": stats["compile_s"] - compile_s,
        "memory_first_bytes": memory[0],
        "memory_last_bytes": memory[-1],
        "memory_growth": memory[-1] / memory[0] - 1,
        "memory_spread": max(memory) / min(memory) - 1,
        "load_average": os.getloadavg(),
    }
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        values = [r[name] for r in rounds]
        figures[name] = {
            "first_tenth": statistics.median(values[:tenth]),
            "last_tenth": statistics.median(values[-tenth:]),
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return figures


if __name__ == "__main__":
    main()
