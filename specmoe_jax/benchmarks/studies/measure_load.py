"""Load rate and peak memory of a synthetic checkpoint against a sequential read of the same files in the same run.

    python -m specmoe_jax.benchmarks.studies.measure_load [--gigabytes=2] [--runs=3] [--folder=DIR]

Every read and every load starts with the files dropped from the page cache; each load is a process of its own. The last
line of the output is one JSON document with the medians. Other work on the machine slows a load more than a read, which
hardly computes: the CPU seconds say what a load takes when left alone (two threads).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.checkpoints.conversion.write import Output, write_safetensors
from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.testing.families import RAW_CONFIGS

SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "eos_token_id": None,
}  # fmt: skip
BYTES_PER_EXPERT_INDEX = 5 * 3 * 1024 * 4096 * 2  # of all layers, bfloat16
FORMS = (("huggingface", "bfloat16"), ("huggingface", "float32"), ("specmoe", "bfloat16"))
CHILD = """
import json, sys, time
import jax
from specmoe_jax.checkpoints import load_model

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

jax.block_until_ready(jax.numpy.zeros(3))
before, start, cpu_start = memory("VmRSS"), time.perf_counter(), time.process_time()
model = load_model(sys.argv[1], dtype=sys.argv[2])
load_s, load_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
weight_bytes = sum(x.nbytes for x in jax.tree.leaves((model.weights, model.experts)))
print(json.dumps({"load_s": load_s, "load_cpu_s": load_cpu_s, "weight_bytes": weight_bytes, "expert_bytes": model.expert_bytes,
                  "peak_host_bytes": memory("VmHWM") - before}))
"""


def write_checkpoint(path: pathlib.Path, gigabytes: float) -> None:
    """Random bfloat16 weights of about that size in one file, as published checkpoints are laid out."""
    experts = max(2, round(gigabytes * 1e9 / BYTES_PER_EXPERT_INDEX))
    raw = RAW_CONFIGS["mixtral"] | SIZES | {"num_local_experts": experts}
    config = parse_config(raw)
    specs = spec_leaves(family_of(config).weight_specs(config))
    for layer in range(config.num_layers):
        for expert in range(experts):
            specs += family_of(config).expert_specs(config, layer, expert)
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    pool = (rng.standard_normal(1 << 24, np.float32) * np.float32(0.02)).astype(dtype)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    outputs = [Output(s.name, dtype, s.shape, lambda s=s: np.resize(pool[rng.integers(999) :], s.shape)) for s in specs]
    write_safetensors(path / "model.safetensors", outputs, {"format": "pt"})


def drop_from_cache(path: pathlib.Path) -> None:
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes_per_s(path: pathlib.Path) -> float:
    """Rate of one cold sequential read of all files, 8 MiB at a time."""
    drop_from_cache(path)
    buffer, total, start = bytearray(8 << 20), 0, time.perf_counter()
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


def measure(path: pathlib.Path, dtype: str) -> dict:
    """One cold read and one cold load."""
    stored_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    read = read_bytes_per_s(path)
    drop_from_cache(path)
    command = [sys.executable, "-c", CHILD, str(path), dtype]
    child = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return child | {
        "stored_bytes": stored_bytes,
        "read_bytes_per_s": read,
        "load_bytes_per_s": stored_bytes / child["load_s"],
        "fraction_of_read": stored_bytes / child["load_s"] / read,
        "experts_above_weights": (child["peak_host_bytes"] - child["weight_bytes"]) / child["expert_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", default=None, help="a folder on the disk to be measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = {form: pathlib.Path(folder) / form for form, _ in FORMS}
        write_checkpoint(paths["huggingface"], arguments.gigabytes)
        convert(str(paths["huggingface"]), paths["specmoe"], to="specmoe")
        runs = {f"{form} {dtype}": [] for form, dtype in FORMS}
        for _ in range(arguments.runs):  # interleaved, so that what else the machine does falls on all
            for form, dtype in FORMS:
                runs[f"{form} {dtype}"].append(measure(paths[form], dtype))
    medians = {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    for name, row in medians.items():
        print(
            f"{name:22} read {row['read_bytes_per_s'] / 1e9:5.2f} GB/s  load {row['load_bytes_per_s'] / 1e9:5.2f} GB/s"
            f"  ({row['fraction_of_read']:.2f})  peak {row['peak_host_bytes'] / 1e6:6.0f} MB for weights of"
            f" {row['weight_bytes'] / 1e6:6.0f} MB ({row['experts_above_weights']:+.2f} experts)  {row['load_cpu_s']:.2f} CPU s"
        )
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
