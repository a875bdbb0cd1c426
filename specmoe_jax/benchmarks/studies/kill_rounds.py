"""Kills a job of many requests at random moments until it is through, and compares with an uninterrupted run.

Counts every token that any of the runs committed, so that it also tells how much work a kill costs.

Not a test that pytest collects (minutes); run it by hand:
    python -m specmoe_jax.benchmarks.studies.kill_rounds --rounds=50 --requests=200
"""

import argparse
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import specmoe_jax as sm

HELD_OUT = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo" / "held_out.txt"


def command(folder: pathlib.Path, output: str, batch_size: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "specmoe_jax.benchmarks.studies.kill_rounds",
        f"--count={folder / output}.tokens",
        f"--prompts={folder / 'prompts.jsonl'}",
        f"--output={folder / output}",
        f"--batch_size={batch_size}",
        f"--stats={folder / 'stats.json'}",
    ]


def counted(count_file: str, arguments: list[str]) -> None:
    """generate.py in this process; each step's committed tokens go to a file at once, so that a kill loses none."""
    from specmoe_jax.engine.engine import Engine

    step, file = Engine.step, os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted_step(self, state):
        state, info = step(self, state)
        os.write(file, b"%d\n" % info.committed.sum())
        return state, info

    Engine.step = counted_step
    sys.argv = ["specmoe", "generate", *arguments]
    runpy.run_module("specmoe_jax", run_name="__main__")


def tokens_of(path: pathlib.Path) -> int:
    return sum(map(int, path.read_text().split()))


def prompts(folder: pathlib.Path, count: int) -> None:
    held_out = HELD_OUT.read_text(encoding="utf-8").splitlines()
    texts = [line for line in held_out if line.strip()]
    records = [{"id": f"r{i}", "prompt": texts[i % len(texts)][: 20 + i % 60], "max_new_tokens": 16 + i % 48} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def killed_run(folder: pathlib.Path, batch_size: int, seconds: float) -> bool:
    """Starts the job and kills it after `seconds`; whether it was through before that."""
    process = subprocess.Popen(command(folder, "killed.jsonl", batch_size), stderr=subprocess.DEVNULL)
    try:
        if process.wait(seconds) != 0:
            raise SystemExit("the job failed by itself")
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prompts(folder, args.requests)
        start = time.perf_counter()
        subprocess.run(command(folder, "whole.jsonl", args.batch_size), check=True, stderr=subprocess.DEVNULL)
        whole_s = time.perf_counter() - start
        useful = tokens_of(folder / "whole.jsonl.tokens")
        expected = sorted((folder / "whole.jsonl").read_bytes().splitlines())
        kills = runs = work = done = 0
        while kills < args.rounds:
            through = killed_run(folder, args.batch_size, rng.uniform(0.3, whole_s))
            kills, runs = kills + (not through), runs + 1
            if through or kills == args.rounds:
                subprocess.run(command(folder, "killed.jsonl", args.batch_size), check=True, stderr=subprocess.DEVNULL)
                assert sorted((folder / "killed.jsonl").read_bytes().splitlines()) == expected, "the files differ"
                work, done = work + tokens_of(folder / "killed.jsonl.tokens"), done + 1
                for path in folder.glob("killed.jsonl*"):
                    path.unlink()
            print(f"\r{kills} kills, {runs} runs", end="", flush=True)
        batch = useful * args.batch_size / args.requests
        repeated = (work - done * useful) / batch / kills
        print(f"\n{kills} kills at random moments of a job of {args.requests} requests: every final file equals the whole one")
        print(f"{done} jobs, {useful} tokens each; repeated: {work - done * useful} tokens, {repeated:.2f} batches a kill")


if __name__ == "__main__":
    if sys.argv[1].startswith("--count="):
        counted(sys.argv[1].partition("=")[2], sys.argv[2:])
    else:
        main()
