"""Does every flow on this machine's accelerator give the tokens of the CPU? The bundled model, float32 at the highest precision.

As a program (python -m specmoe_jax.benchmarks.gpu.exact FILE), which the rows run on the CPU: the resident preset's tokens in FILE.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from specmoe_jax import checkpoints
from specmoe_jax.benchmarks.gpu import record
from specmoe_jax.checkpoints import load_head, load_model
from specmoe_jax.config.presets import preset
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import Engine
from specmoe_jax.jobs.prompts import read_prompts
from specmoe_jax.models.model import Model
from specmoe_jax.support.timing import CompileCounter

FLOWS = ("resident", "on_demand", "specmoe", "streaming", "specmoeoff")
ROWS, PROMPT, NEW = 8, 48, 32
TIE = 1e-4  # difference of two logits, of magnitude 10, up to which their order may depend on the order of float32 sums

Tokens = list[list[int]]


def rows(flows: tuple[str, ...] = FLOWS) -> Iterator[dict]:
    """Two rows for each flow: what generating took; whether the tokens are the CPU's, and where not, the first differences."""
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder, cpu_process(path := pathlib.Path(folder) / "tokens.json") as process:
        wanted, model = functools.cache(lambda: tokens_of_cpu(process, path)), load_model("demo")
        prompts = prompts_of(model)
        for flow in flows:
            yield from record.asked(f"exact: {flow}", lambda flow=flow: compared(model, flow, prompts, wanted))


def compared(model: Model, flow: str, prompts: list[tuple[int, ...]], wanted: Callable[[], Tokens]) -> Iterator[dict]:
    """exact: all tokens are equal. only_ties: every row's first difference is between two logits as good as equal."""
    start_s, compiles = time.perf_counter(), CompileCounter()
    found = tokens_of(model, flow, prompts)
    seconds = {"seconds": time.perf_counter() - start_s, "compilations": compiles.count, "compile_s": compiles.seconds}
    yield {"question": "generated", "flow": flow, "new_tokens": sum(map(len, found))} | seconds
    rows = zip(prompts, wanted(), found, strict=True)
    differences = [difference(model, prompt, of_cpu, own) for prompt, of_cpu, own in rows if of_cpu != own]
    ties = all(abs(one["logit_difference"]) <= TIE for one in differences)
    yield {"question": "exact", "flow": flow, "exact": not differences, "only_ties": ties, "differences": differences}


def difference(model: Model, prompt: tuple[int, ...], wanted: list[int], found: list[int]) -> dict:
    """The first token that differs, with the reference forward's logits of both there."""
    at = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    logits = np.asarray(model.logits(np.array([[*prompt, *wanted[:at]]])))[0, -1]
    of_wanted, of_found = float(logits[wanted[at]]), float(logits[found[at]])
    row = {"token": at, "wanted": wanted[at], "found": found[at], "logit_wanted": of_wanted, "logit_found": of_found}
    return row | {"logit_difference": of_wanted - of_found}


def tokens_of(model: Model, flow: str, prompts: list[tuple[int, ...]]) -> Tokens:
    """Greedy tokens of a preset, of one batch."""
    plan = preset(flow, model.config).replace(batch_size=len(prompts), dtype="float32")
    head = load_head("demo", model) if flow == "specmoeoff" else None
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    return [list(completion.token_ids) for completion in Engine(model, plan, draft_head=head).generate(prompts, params)]


def prompts_of(model: Model) -> list[tuple[int, ...]]:
    """Of the bundled model's held-out text, cut to lengths that differ."""
    path = pathlib.Path(checkpoints.__file__).parent / "demo" / "held_out.txt"
    texts = [prompt.text for prompt in read_prompts(str(path), SamplingParams())][:ROWS]
    return [tuple(model.tokenizer.encode(text)[: PROMPT - 3 * i]) for i, text in enumerate(texts)]


def cpu_process(path: pathlib.Path) -> subprocess.Popen[str]:
    """This program on the CPU, beside what runs here."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "specmoe_jax.benchmarks.gpu.exact", str(path)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def tokens_of_cpu(process: subprocess.Popen[str], path: pathlib.Path) -> Tokens:
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the tokens of the CPU could not be computed: {err[-2000:]}")
    return json.loads(path.read_text())


def main() -> None:
    model = load_model("demo")
    pathlib.Path(sys.argv[1]).write_text(json.dumps(tokens_of(model, "resident", prompts_of(model))))


if __name__ == "__main__":
    main()
