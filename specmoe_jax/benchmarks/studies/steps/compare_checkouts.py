"""Tokens per second of two checkouts on the bundled model, side by side: has a change made anything slower?

Each checkout runs in a process of its own, started once; a round asks every process in turn, in alternating order, and a ratio
is the median of the rounds' paired ratios. Both need their compiled kernels in the package:
    python -m specmoe_jax.benchmarks.studies.steps.compare_checkouts --before=DIR --after=DIR
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

import specmoe_jax as sm

HELD_OUT = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo" / "held_out.txt"
CASES = (("resident", 1), ("resident", 16), ("on_demand", 16), ("streaming", 16), ("specmoe", 1), ("specmoe", 16))
NEW_TOKENS = 48


def serve() -> None:
    """Answers each "PRESET BATCH" on stdin by the tokens per second of one call; compiled and warm before the first."""
    model = sm.load_model("demo")
    texts = [line[:60] for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line) > 20]
    sampling = sm.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    engines = {}
    for preset, batch in CASES:
        engine = sm.Engine(model, sm.PRESETS[preset](model.config).replace(batch_size=batch))
        engines[preset, str(batch)] = engine, texts[:batch]
    for _ in range(2):
        for engine, prompts in engines.values():
            engine.generate(prompts, sampling)
    print("ready", flush=True)
    for line in sys.stdin:
        engine, prompts = engines[tuple(line.split())]
        began = time.perf_counter()
        answers = engine.generate(prompts, sampling)
        print(sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - began), flush=True)


def start(checkout: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": checkout}
    command = [sys.executable, __file__, "--serve"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"the engine of {checkout} did not start; its error stands above")
    return process


def ask(process: subprocess.Popen, preset: str, batch: int) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{preset} {batch}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a checkout")
    parser.add_argument("--after", help="another one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    if not args.before or not args.after:
        parser.error("--before and --after are needed, a checkout each")
    before, after = start(args.before), start(args.after)
    print(f"{'preset':10} {'batch':>5} {'before':>8} {'after':>8}  ratio (least to most)")
    for preset, batch in CASES:
        pairs = []
        for number in range(args.rounds):
            order = (before, after) if number % 2 else (after, before)
            rates = {process: ask(process, preset, batch) for process in order}
            pairs.append((rates[before], rates[after]))
        ratios = sorted(new / old for old, new in pairs)
        old, new = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{preset:10} {batch:5} {old:8.1f} {new:8.1f}  {statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
    for process in (before, after):
        process.kill()


if __name__ == "__main__":
    main()
