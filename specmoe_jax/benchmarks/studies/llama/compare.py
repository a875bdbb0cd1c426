"""This engine beside llama.cpp on the same random weights: decoding, prompts, load and memory; run by hand:

    python -m specmoe_jax.benchmarks.studies.llama.compare --folder=DIR --contest=bf16 [--shape=real] [--llama_python=PYTHON]

DIR keeps what is made: the checkpoint, its mapped forms, GGUF files, and results.jsonl, to which a row is added as it is
measured, so contests can be run one by one. Every engine is a process of its own and is asked in turn for a few steps; figures are
medians, and the first tokens of the first row are beside them: greedy, so alike where rounding decides nothing. Without
--llama_python the package llama-cpp-python is built from the registry's source into DIR/llama; where that fails, its last line is
shown and our own rows are measured alone.

`others` is the share of the processors that other processes took meanwhile: measure rows of a busy machine again.
The read bound is the bytes that a step has to read (every dense weight, and of the experts what uniform routing chooses, as they
are stored here) over the rate at which this process's threads read memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import venv
from typing import Any, NamedTuple

from specmoe_jax.benchmarks.studies.measure_promises import joining
from specmoe_jax.ops.cpu import _ffi

WORKER = pathlib.Path(__file__).with_name("worker.py")
SECONDS = 1.0  # that an engine steps for at a turn, about
READ_BYTES = 1 << 30


class Ours(NamedTuple):
    """What is loaded, how it is packed, the flow. bits: of a dense weight; expert_bits: of an expert's, both with scales."""

    dtype: str
    expert_dtype: str | None
    dense_dtype: str | None
    flow: str
    bits: float
    expert_bits: float

    @property
    def name(self) -> str:
        dense = f" (dense {self.dense_dtype})" if self.dense_dtype else ""
        return f"{self.expert_dtype or self.dtype}{dense} {self.flow}"


HOST = "host_compute"
CONTESTS = {
    "bf16": ([Ours("bfloat16", None, None, flow, 16, 16) for flow in (HOST, "resident", "on_demand")], ["bf16", "f16"]),
    "f32": ([Ours("float32", None, None, HOST, 32, 32)], ["f32"]),
    "int8": ([Ours("bfloat16", "int8", *dense, 8.05) for dense in ((None, HOST, 16), ("int8", HOST, 8.03))], ["q8_0"]),
    "int4": (
        [Ours("bfloat16", "int4", *dense, 4.5) for dense in ((None, HOST, 16), ("int8", HOST, 8.03), ("int4", HOST, 4.5))],
        ["q4_0"],
    ),
}


class Worker:
    """A process that is idle but while it is asked."""

    def __init__(self, name: str, python: str, kind: str, options: dict, group: pathlib.Path | None = None):
        """group: a control group that the process joins before it runs."""
        self.name, self.peak_bytes, self.tokens = name, 0, []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} if kind == "own" else dict(os.environ)
        self._process = subprocess.Popen(
            [python, str(WORKER), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=joining(group),
        )
        self.load_s, self.pid = self._answer()["load_s"], self._process.pid

    def ask(self, **what) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_bytes, self.tokens = answer["peak_bytes"], answer.get("tokens", self.tokens)
        return answer.get("seconds")

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with {self._process.wait()}")
        return json.loads(line)


def step_bytes(c: dict, ours: Ours, rows: int) -> float:
    """Of one step for `rows` rows."""
    hidden, experts, chosen = c["hidden_size"], c["num_experts"], c["num_experts_per_tok"]
    heads = (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
    read = experts * (1 - (1 - chosen / experts) ** rows)
    layer = (
        heads * hidden * ours.bits
        + experts * hidden * ours.bits
        + read * 3 * hidden * c["moe_intermediate_size"] * ours.expert_bits
    )
    return (c["num_hidden_layers"] * layer + c["vocab_size"] * hidden * ours.bits) / 8


def without_amx() -> dict[str, str]:
    """For the build of llama.cpp on a CPU with AMX: ggml 0.25.3 by GCC 12 crashes there (its issue 20824)."""
    if "amx_tile" not in pathlib.Path("/proc/cpuinfo").read_text():
        return {}
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return {"CMAKE_ARGS": f"-DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'"}


def llama_python(folder: pathlib.Path) -> str | None:
    """Of a virtual environment with llama-cpp-python, built where it is not there; None where it cannot be built."""
    home = folder / "llama"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    build = [str(python), "-m", "pip", "install", "--quiet", "--no-binary=llama-cpp-python", "llama-cpp-python"]
    found = subprocess.run(build, capture_output=True, text=True, check=False, env=os.environ | without_amx())
    if found.returncode:
        print(f"llama.cpp is left out, its build failed: {found.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return str(python)


def workers(folder: pathlib.Path, options: argparse.Namespace) -> list[tuple[Worker, Ours | None]]:
    """Those of a contest, ours with their plan. What they load is made first."""
    from specmoe_jax.benchmarks.studies.llama import files

    ours, theirs = CONTESTS[options.contest]
    python = None if options.alone else options.llama_python or llama_python(folder)
    for plan in ours:
        files.mapped(folder, options.shape, plan.dtype)
    made = [files.gguf_file(folder, options.shape, kind) for kind in theirs] if python else []
    if options.make_only:
        return []
    started: list[tuple[Worker, Ours | None]] = []
    for plan in ours:
        if options.flows and plan.flow not in options.flows.split(","):
            continue
        model = files.mapped(folder, options.shape, plan.dtype)
        given = {name: getattr(plan, name) for name in ("dtype", "expert_dtype", "dense_dtype", "flow")} | {"model": str(model)}
        started.append((Worker(f"specmoe_jax {plan.name}", sys.executable, "own", given), plan))
    for kind, file in zip(theirs, made, strict=False):
        given = {"model": str(file), "threads": os.cpu_count()}
        started.append((Worker(f"llama.cpp {kind}", python or "", "llama", given), None))
    return started


def busy_s(pid: int | None = None) -> float:
    """Processor seconds of a process with its threads so far, or of all together (Linux)."""
    if pid is None:
        user, nice, system, *_ = map(int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:  # it ended, of which whoever asks it next says more
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Others:
    """share: of the processors, that other processes took while it was open."""

    def __init__(self, pids: list[int]):
        self._pids, self.share = pids, 0.0

    def __enter__(self):
        self._before = time.perf_counter(), self._busy()
        return self

    def __exit__(self, *_):
        seconds, busy = time.perf_counter() - self._before[0], self._busy() - self._before[1]
        self.share = max(busy, 0.0) / seconds / (os.cpu_count() or 1)

    def _busy(self) -> float:
        return busy_s() - sum(map(busy_s, [os.getpid(), *self._pids]))


def decode(running: list[tuple[Worker, Ours | None]], rows: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step by engine."""
    turns, found = {}, {worker.name: [] for worker, _ in running}
    for worker, _ in running:
        worker.ask(do="start", rows=rows)
        settled = worker.ask(do="steps", count=4)
        turns[worker.name] = max(2, min(40, int(SECONDS / min(settled))))
    for _ in range(rounds):
        for worker, _ in running:
            found[worker.name] += worker.ask(do="steps", count=turns[worker.name])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    from specmoe_jax.benchmarks.studies.llama import files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="room for 3 to 12 GB a contest")
    parser.add_argument("--contest", required=True, choices=CONTESTS)
    parser.add_argument("--shape", default="real", choices=files.SHAPES)
    parser.add_argument("--flows", help="of ours, by comma; all by default")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt that is timed; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama_python", help="a Python that has llama-cpp-python")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--make_only", action="store_true", help="make the files of the contest and measure nothing")
    options = parser.parse_args()
    folder = pathlib.Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    running = workers(folder, options)

    def say(**row) -> None:
        row = {"shape": options.shape, "contest": options.contest} | row
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    for rows in map(int, options.batches.split(",") if options.batches and running else ()):
        rate = max(_ffi.read_bandwidth(READ_BYTES, os.cpu_count() or 1) for _ in range(3))
        with Others([worker.pid for worker, _ in running]) as others:
            found = decode(running, rows, options.rounds)
        for (worker, plan), s in zip(running, found.values(), strict=True):
            bound = None if plan is None else rows / (step_bytes(files.SHAPES[options.shape], plan, rows) / rate)
            share = None if bound is None else rows / s / bound
            say(
                engine=worker.name, batch=rows, tokens_per_s=rows / s, read_bound=bound, share_of_bound=share,
                read_gbps=rate / 1e9, others=others.share, first_tokens=worker.tokens,
            )  # fmt: skip
    for worker, _ in running if options.prompt else ():
        worker.ask(do="start", rows=1, tokens=options.prompt)  # compiles
        seconds = [worker.ask(do="start", rows=1, tokens=options.prompt) for _ in range(3)]
        say(engine=worker.name, prompt_tokens=options.prompt, prompt_tokens_per_s=options.prompt / statistics.median(seconds))
    for worker, _ in running:
        say(engine=worker.name, load_s=worker.load_s, peak_gb=worker.peak_bytes / 1e9)
        worker.close()


if __name__ == "__main__":
    main()
