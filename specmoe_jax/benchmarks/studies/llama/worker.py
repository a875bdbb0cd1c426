"""One engine in a process of its own, which answers lines of JSON: run by compare.py, with the Python of that engine.

    python worker.py own   '{"model": DIR, "dtype": "bfloat16", "expert_dtype": null, "dense_dtype": null, "flow": "host_compute"}'
    python worker.py llama '{"model": FILE.gguf, "threads": 2}'

Nothing but the standard library and numpy is imported before the engine is known: llama.cpp's Python has no JAX.
"""

import ctypes
import importlib
import json
import pathlib
import re
import sys
import time
from typing import Any

import numpy as np

PROMPT, ROOM = 32, 512  # tokens of a row before its steps; positions of a row


class Own:
    """preset: nothing but the flow by default. memory_bytes: of the whole process, of which the cache of a disk tier takes what is
    left; experts are in host memory by default.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        expert_dtype: str | None = None,
        dense_dtype: str | None = None,
        flow: str | None = None,
        preset: str | None = None,
        memory_bytes: int | None = None,
        temperature: float = 0.0,
    ):
        import specmoe_jax as sm
        from specmoe_jax.benchmarks.studies.measure_promises import anonymous
        from specmoe_jax.models.quantised import quantise

        self._sm, self._memory_bytes, self._process_bytes, self._temperature = sm, memory_bytes, anonymous(), temperature
        loaded = sm.load_model(model, dtype=dtype, expert_tier="disk" if memory_bytes else "host")
        self._model = quantise(loaded, expert_dtype, dense_dtype)
        packed = {"expert_dtype": expert_dtype, "dense_dtype": dense_dtype}
        plan = sm.PRESETS[preset](loaded.config) if preset else sm.Plan(preset="probe")
        self._plan = plan.replace(dtype=dtype, **packed, **({"expert_flow": flow} if flow else {}))
        self.vocabulary = loaded.config.vocab_size
        self._engine: Any = None
        self._state: Any = None

    def start(self, prompts: list[list[int]]) -> None:
        new_tokens = ROOM - len(prompts[0]) - 1
        params = self._sm.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=self._temperature, seed=0)
        self._state = None  # before another takes its place
        plan = self._plan.replace(batch_size=len(prompts))
        self._engine = self._sm.Engine(self._model, within(self._model, plan, self._memory_bytes, self._process_bytes))
        self._state = self._engine.init(prompts, params)

    def step(self) -> None:
        assert self._engine is not None  # started
        self._state, _ = self._engine.step(self._state)

    def tokens(self) -> list[int]:
        return list(self._state.generated[0])


def within(model, plan, memory_bytes: int | None, process_bytes: int):
    """The plan, whose disk tier caches as many experts as a process of this size may hold beside all else."""
    from specmoe_jax.planner.memory.account import account, cache_positions
    from specmoe_jax.planner.memory.memory_account import PROGRAM_BYTES

    if memory_bytes is None:
        return plan
    plan = plan.replace(expert_tier="disk", host_memory_bytes=memory_bytes)
    needs = account(model.config, plan, batch_rows=plan.batch_size, positions=cache_positions(ROOM, plan))
    return plan.replace(host_memory_bytes=memory_bytes - process_bytes - PROGRAM_BYTES - needs.accelerator_bytes)


class Llama:
    """temperature: above 0 it continues with tokens at random, all alike."""

    def __init__(self, model: str, threads: int, temperature: float = 0.0):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._lib = lib = llama_cpp
        lib.llama_backend_init()
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, None)
        self._threads, self._context = threads, None
        self._random = np.random.default_rng(0) if temperature else None
        self._model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def start(self, prompts: list[list[int]]) -> None:
        lib, rows = self._lib, len(prompts)
        if self._context:
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = rows * ROOM, 512, 512, rows
        params.n_threads = params.n_threads_batch = self._threads
        self._context = lib.llama_init_from_model(self._model, params)
        self._batch = lib.llama_batch_init(512, 0, 1)
        self._last, self._length = [], len(prompts[0])
        for row, prompt in enumerate(prompts):
            self._decode([(token, position, row, position + 1 == len(prompt)) for position, token in enumerate(prompt)])
            self._last += self._greedy(1)
        self._tokens = self._last[:1]

    def step(self) -> None:
        self._decode([(token, self._length, row, True) for row, token in enumerate(self._last)])
        self._last, self._length = self._greedy(len(self._last)), self._length + 1
        self._tokens.append(self._last[0])

    def tokens(self) -> list[int]:
        return self._tokens

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, answered) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, answered
            batch.seq_id[i][0] = row
        if failed := self._lib.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode answered {failed}")

    def _greedy(self, rows: int) -> list[int]:
        if self._random is not None:
            return self._random.integers(3, self.vocabulary, rows).tolist()
        logits = self._lib.llama_get_logits(self._context)
        array = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (rows, self.vocabulary))
        return array.argmax(-1).tolist()


def peak_bytes() -> int:
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found) << 10


def prompts(vocabulary: int, rows: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, vocabulary, size=(rows, tokens)).tolist()


def main() -> None:
    kind, imported = {"own": (Own, "specmoe_jax.engine"), "llama": (Llama, "llama_cpp")}[sys.argv[1]]
    importlib.import_module(imported)  # not part of the load
    start_s = time.perf_counter()
    engine = kind(**json.loads(sys.argv[2]))
    print(json.dumps({"load_s": time.perf_counter() - start_s}), flush=True)
    for line in sys.stdin:
        asked, start_s = json.loads(line), time.perf_counter()
        answer = {}
        if asked["do"] == "start":
            engine.start(prompts(engine.vocabulary, asked["rows"], asked.get("tokens", PROMPT)))
            answer = {"seconds": time.perf_counter() - start_s}
        elif asked["do"] == "steps":
            answer = {"seconds": [_timed(engine.step) for _ in range(asked["count"])], "tokens": engine.tokens()[:8]}
        print(json.dumps(answer | {"peak_bytes": peak_bytes()}), flush=True)


def _timed(call) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
