"""What requests of a service wait for where it has more rows than requests; run by hand:

    python -m specmoe_jax.benchmarks.studies.steps.measure_service --model=DIR --dtype=bfloat16 --rows=64 --requests=1,4,16

So many requests come at once, each with a prompt of its own; the first round compiles and is not shown. A line for each number of
them: milliseconds until all have a token (their prompts are read in groups, and those that came first decode meanwhile), of a step
with all of them, and tokens/s of all. Two checkouts are compared by PYTHONPATH, in turn.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np

import specmoe_jax as sm
from specmoe_jax.engine.service.service import Service

ROUNDS, TOKENS = 3, 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--flow", default="host_compute")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--prompt_tokens", type=int, default=20)
    options = parser.parse_args()
    model = sm.load_model(options.model, dtype=options.dtype)
    plan = sm.Plan(preset="probe", batch_size=options.rows, dtype=options.dtype, expert_flow=options.flow)
    service = sm.Engine(model, plan).service(max_tokens=options.max_tokens)
    prompts = drawn(model.config.vocab_size, options.prompt_tokens)
    counts = [int(count) for count in options.requests.split(",")]
    seen: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
    for _ in range(ROUNDS + 1):
        for count in counts:
            seen[count].append(measured(service, [next(prompts) for _ in range(count)]))
    print(f"{'requests':>10}{'first tokens ms':>18}{'step ms':>10}{'tokens/s':>10}")
    for count, rounds in seen.items():
        first_s, step_s, rate = map(statistics.median, zip(*rounds[1:], strict=True))
        print(f"{count:>10}{first_s * 1e3:>18.0f}{step_s * 1e3:>10.1f}{rate:>10.1f}", flush=True)


def drawn(vocabulary: int, tokens: int) -> Iterator[list[int]]:
    """Prompts that share no beginning."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(3, vocabulary, tokens).tolist()


def measured(service: Service, prompts: list[list[int]]) -> tuple[float, float, float]:
    """Seconds until every request has a token, of a step when all have one, and tokens/s of all."""
    params = sm.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    start_s = time.perf_counter()
    begun: set[int] = set()
    handles = [service.submit(prompt, params, on_event=lambda event: begun.add(event.id)) for prompt in prompts]
    steps, first_s = [], 0.0
    while not all(handle.done for handle in handles):
        step_s = time.perf_counter()
        full = len(begun) == len(prompts) and not any(handle.done for handle in handles)
        service.step()
        now_s = time.perf_counter()
        steps += [now_s - step_s] if full else []
        first_s = first_s or (now_s - start_s if len(begun) == len(prompts) else 0.0)
    return first_s, statistics.median(steps), len(prompts) * TOKENS / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
