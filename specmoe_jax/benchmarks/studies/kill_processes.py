"""Kills one of two processes of a job at random moments: how long the other takes to end, what it says, and the file in the end.

The tiny model on two CPU devices that talk over gloo. After each kill the job goes on, in turn in one process and in two, and its
file is compared with that of an uninterrupted run.

Not a test that pytest collects (minutes); run it by hand:
    python -m specmoe_jax.benchmarks.studies.kill_processes --rounds=10
"""

import argparse
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

from specmoe_jax.testing import byte_tokenizer, write_tiny

REQUESTS = 12
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def command(folder: pathlib.Path, output: str) -> list[str]:
    """Of the whole job in one process; a slow link, so that there is a middle of it to be killed in."""
    return [
        *(sys.executable, "-m", "specmoe_jax", "generate", f"--model={folder}", f"--prompts={folder / 'prompts.jsonl'}"),
        *(f"--output={folder / output}", "--preset=specmoe", "--batch_size=2", "--link_gbps=0.03", "--progress=none"),
    ]


def write_job(folder: pathlib.Path, requests: int = REQUESTS) -> None:
    write_tiny(folder)
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    records = [{"prompt": "abcdefgh"[: 1 + i % 8], "max_new_tokens": 8 + i % 5, "ignore_eos": True} for i in range(requests)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def start(folder: pathlib.Path, output: str) -> list[subprocess.Popen]:
    """Two processes of the job."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    where = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--devices=2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return [subprocess.Popen([*command(folder, output), *where, f"--process_id={number}"], **pipes) for number in range(2)]


def answers(folder: pathlib.Path, output: str) -> list[bytes]:
    """The lines of a file, in any order."""
    path = folder / output
    return sorted(path.read_bytes().splitlines()) if path.exists() else []


def end_of_other(both: list[subprocess.Popen], victim: int) -> tuple[int, str, float]:
    """Kills one of two. -> exit code, what the other said, and the seconds until it had ended."""
    both[victim].kill()
    since = time.perf_counter()
    _, said = both[1 - victim].communicate(timeout=120)
    both[victim].communicate()
    return both[1 - victim].returncode, said, time.perf_counter() - since


def go_on(folder: pathlib.Path, output: str, processes: int) -> None:
    """The same job to its end. Raises RuntimeError where it fails."""
    if processes == 2:
        both = start(folder, output)
        said = [one.communicate(timeout=600)[1] for one in both]
        if any(one.returncode for one in both):
            raise RuntimeError("\n".join(said))
        return
    done = subprocess.run(command(folder, output), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, times = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_job(folder)
        begun = time.perf_counter()
        go_on(folder, "whole.jsonl", 2)
        whole_s, expected = time.perf_counter() - begun, answers(folder, "whole.jsonl")
        while len(times) < args.rounds:
            victim, moment_s, output = rng.randrange(2), rng.uniform(0.0, whole_s), f"{len(times)}.jsonl"
            both = start(folder, output)
            time.sleep(moment_s)
            if both[0].poll() is not None or both[1].poll() is not None:  # it was through
                for one in both:
                    one.communicate()
                (folder / output).unlink(missing_ok=True)
                (folder / f"{output}.journal").unlink(missing_ok=True)
                continue
            code, said, seconds = end_of_other(both, victim)
            done = len(answers(folder, output))
            go_on(folder, output, 1 + len(times) % 2)
            same = answers(folder, output) == expected
            times.append(seconds)
            told = {"victim": victim, "killed_after_s": moment_s, "answers": done, "ended_after_s": seconds, "code": code}
            print(json.dumps(told | {"lines": len(said.splitlines()), "said": said[:200], "same_file": same}), flush=True)
    print(f"{args.rounds} kills: the other process ended after {max(times):.1f} s at most")


if __name__ == "__main__":
    main()
