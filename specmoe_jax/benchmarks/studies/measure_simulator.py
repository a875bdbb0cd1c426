"""By hand: the simulator given the engine's own task times, against the engine's iterations. How right is the schedule alone?

    python -m specmoe_jax.benchmarks.studies.measure_simulator
Streamed plans of the bundled model, the link emulated or not. What the engine does not time (embedding, copies of activations, the
head, acceptance) takes nothing here, so the smallest iterations come out short.
"""

import collections
import os
import statistics
import time

import specmoe_jax as sm
from specmoe_jax.offload.stream_schedule import pass_tasks
from specmoe_jax.planner.simulate import simulate

ROWS, WARM = 16, 4  # requests; steps that are left out, the first of which fill the cache
PROMPTS = [tuple(range(5 + row, 29 + row)) for row in range(ROWS)]
PARAMS = sm.SamplingParams(max_new_tokens=32, ignore_eos=True)
SETTINGS = [(rate, items, drafted) for rate in (1e8, 5e8, 2e9, None) for items in (1, 2) for drafted in (0, 4)]


def main() -> None:
    model = sm.load_model("demo")
    print(
        "| link GB/s | micro-batches | drafted | measured ms | simulated / measured | naive / measured |\n|---|---|---|---|---|---|"
    )
    for rate, items, drafted in SETTINGS:
        plan = sm.PRESETS["streaming"](model.config).replace(batch_size=ROWS, micro_batches=items, link_bytes_per_s=rate)
        plan = plan.replace(draft="ngram", draft_length=drafted) if drafted else plan
        measured_s, found = measure(model, plan)
        shown = "own" if rate is None else f"{rate / 1e9:g}"
        ratios = f"{found.iteration_s / measured_s:.2f} | {found.naive_s / measured_s:.2f}"
        print(f"| {shown} | {items} | {drafted} | {measured_s * 1e3:.1f} | {ratios} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def measure(model, plan):
    """Median seconds between steps in which all rows run, and the simulation with the medians of their tasks."""
    spans, steps = [], []
    engine = sm.Engine(model, plan, spans=spans)
    engine.generate(PROMPTS, PARAMS, on_step=lambda info: steps.append((time.perf_counter(), info)))
    steady = [(before, now, info) for (before, _), (now, info) in zip(steps[WARM:], steps[WARM + 1 :], strict=False)]
    steady = [(before, now, info) for before, now, info in steady if info.active.all()]
    first_s, last_s = steady[0][0], steady[-1][1]
    times = collections.defaultdict(list)
    for span in spans:
        if first_s < span.start_s and span.end_s < last_s:
            times[span.kind, span.layer, span.micro_batch].append(span.end_s - span.start_s)
    found = simulate(
        pass_tasks(tuple(index is not None for index in model.config.moe_index), plan.micro_batches, 1),
        lambda task: statistics.median(times.get((task.kind, task.layer, task.micro_batch), [0.0])),
        draft_s=statistics.median(info.drafting_s + info.commit_s for _, _, info in steady),
    )
    return statistics.median(now - before for before, now, _ in steady), found


if __name__ == "__main__":
    main()
