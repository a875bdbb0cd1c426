"""Routing traces: which experts each token of each request was sent to, a file for each request."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.engine.requests.completion import Completion
from specmoe_jax.engine.requests.routing import RequestRouting
from specmoe_jax.support.atomic_files import replacing
from specmoe_jax.support.errors import PlanError, RequestError


def trace_file(folder: pathlib.Path, index: int) -> pathlib.Path:
    """Of the request of this number in its job."""
    return folder / f"{index:08d}.npz"


def prepare_folder(folder: pathlib.Path, done: Iterable[int]) -> None:
    """Makes the folder. Raises RequestError where it cannot be, or where it lacks the trace of a request that was done before."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RequestError(f"cannot write {folder} ({e.strerror}); --routing_traces takes a new folder or one that exists") from e
    for index in sorted(done):
        if not (file := trace_file(folder, index)).is_file():
            said = f"request {index} was done before and {file} is missing"
            raise RequestError(f"{said}; give the folder of before, or begin anew with --restart")


def write_trace(folder: pathlib.Path, completion: Completion) -> None:
    """The routing of a finished request: the whole file or none of it. Raises RequestError."""
    routing = completion.routing
    assert routing is not None  # the engine tells it
    arrays = {"ids": routing.ids, "prompt_tokens": np.int64(routing.prompt_tokens)}
    arrays |= {} if routing.weights is None else {"weights": routing.weights}
    with replacing(str(trace_file(folder, completion.id))) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_trace(path: pathlib.Path) -> RequestRouting:
    """What `write_trace` wrote. Raises RequestError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, prompt_tokens = file["ids"], int(file["prompt_tokens"])
            weights = file["weights"] if "weights" in file else None
    except (OSError, ValueError, KeyError, EOFError, TypeError) as e:
        raise RequestError(f"cannot read the trace {path} ({e}); specmoe generate --routing_traces=DIR writes one") from e
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not 0 <= prompt_tokens <= len(ids):
        raise RequestError(f"{path} holds {ids.dtype} {list(ids.shape)} and no routing [tokens, layers, choices]")
    return RequestRouting(ids, weights, prompt_tokens)


def read_counts(path: pathlib.Path, config: ModelConfig, batch: int) -> np.ndarray:
    """[S, L, E]: counts of a .npy file, or of the requests of a folder or of one file, decoded plainly. Raises UserError."""
    if path.is_dir() or path.suffix == ".npz":
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not files:
            raise RequestError(f"{path} holds no trace; specmoe generate --routing_traces={path} writes some")
        return plain_decoding([read_trace(file) for file in files], config, batch)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise PlanError(f"cannot read the trace {path} ({e}); np.save counts [passes, layers, experts]") from e


def read_popularity(path: pathlib.Path, config: ModelConfig) -> np.ndarray:
    """[L, E] int64, how often each expert was chosen in all passes of `read_counts`. Raises UserError."""
    counts = read_counts(path, config, batch=1)
    return counts.sum(axis=0) if counts.ndim == 3 else counts


def plain_decoding(traces: Sequence[RequestRouting], config: ModelConfig, batch: int) -> np.ndarray:
    """[S, L, E] counts of the passes in which plain decoding generates them, `batch` at a time, in their order.

    Raises RequestError for traces of another model.
    """
    for trace in traces:
        layers = trace.ids.shape[1]
        if layers != config.num_moe_layers or (trace.ids >= config.num_experts).any() or (trace.ids < 0).any():
            said = f"{layers} layers, experts up to {trace.ids.max(initial=0)}"
            raise RequestError(
                f"a trace is of another model ({said}); this one has {config.num_moe_layers} layers of {config.num_experts} experts"
            )
    passes = []
    for start in range(0, len(traces), batch):
        decoded = [trace.ids[trace.prompt_tokens :] for trace in traces[start : start + batch]]
        counts = np.zeros((max(map(len, decoded)), config.num_moe_layers, config.num_experts), np.int64)
        for ids in decoded:
            np.add.at(counts, (np.arange(len(ids))[:, None, None], np.arange(ids.shape[1])[:, None], ids), 1)
        passes.append(counts)
    return np.concatenate(passes) if passes else np.zeros((0, config.num_moe_layers, config.num_experts), np.int64)
