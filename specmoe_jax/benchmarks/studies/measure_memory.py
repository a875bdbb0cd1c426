"""The memory account of a streamed plan against what the process really takes; run by hand:

    python -m specmoe_jax.benchmarks.studies.measure_memory --gib=1.5

Host and accelerator are the same memory on a CPU, so the process's peak is held against the sum of both accounts; the
accelerator's part is told apart by what JAX holds alive in device memory, without the KV pages and the queries, keys and
values that wait for the CPU's attention (by their shapes), which are in host memory where there is an accelerator.
"""

import argparse
import dataclasses
import gc
import pathlib
import re

import jax
import numpy as np

import specmoe_jax as sm
from specmoe_jax.benchmarks.peak import Peak
from specmoe_jax.benchmarks.specmoeoff import MIXTRAL_SHAPED
from specmoe_jax.models.model import random_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.5, help="size of the experts")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--pinned_layers", type=int, default=0, help="of 12")
    parser.add_argument("--prefill_attention", default="cpu", choices=("cpu", "accelerator"))
    options = parser.parse_args()
    hidden = 1792
    config = dataclasses.replace(MIXTRAL_SHAPED, hidden_size=512, expert_hidden=hidden, num_layers=12)
    experts = int(options.gib * (1 << 30) / (config.num_moe_layers * config.expert_params * 4))
    config = dataclasses.replace(config, num_experts=experts)
    prompts = [tuple(np.random.default_rng(i).integers(0, config.vocab_size, options.prompt).tolist()) for i in range(options.rows)]
    # Programs are compiled on a model of two experts first, so that their memory is not taken for the model's.
    run(random_model(dataclasses.replace(config, num_experts=2, num_layers=2)), prompts[:2], options)
    gc.collect()  # an engine is part of a cycle, and its buffers would be counted
    before = resident("VmRSS")
    model = random_model(config)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    account, device_peak = run(model, prompts, options)
    peak = resident("VmHWM") - before
    told = account.host_bytes + account.accelerator_bytes
    print(f"{'':<36}{'account':>12}{'measured':>12}  ratio")
    print(f"{'process beyond its start, MiB':<36}{told / 2**20:>12.0f}{peak / 2**20:>12.0f}  {peak / told:.3f}")
    print(
        f"{'accelerator arrays alive, MiB':<36}{account.accelerator_bytes / 2**20:>12.0f}{device_peak / 2**20:>12.0f}"
        f"  {device_peak / account.accelerator_bytes:.3f}"
    )


def run(model: sm.Model, prompts, options):
    """Generates. -> the account, and the most bytes of device arrays alive at a time, KV pages aside."""
    plan = sm.PRESETS["streaming"](model.config).replace(batch_size=options.rows, prefill_attention=options.prefill_attention)
    pinned = options.pinned_layers if model.config.num_layers > 2 else 0
    engine = sm.Engine(model, plan.replace(pinned_layers=pinned))
    layer = model.config.layers[0].attention
    staged = [(layer.num_heads, layer.head_dim), (layer.num_kv_heads, layer.head_dim)]
    with Peak(lambda: alive(staged)) as peak:
        engine.generate(prompts, sm.SamplingParams(max_new_tokens=8, ignore_eos=True))
    account = engine._resources.account
    assert account is not None  # of the job that has run
    return account, peak.most - account.kv_bytes


def alive(staged: list[tuple[int, int]]) -> int:
    """Bytes of `jax.live_arrays`, but for those of such last two dims. A function, so that no array is held between two looks."""
    arrays = (array for array in jax.live_arrays() if array.ndim != 4 or array.shape[2:] not in staged)
    return sum(dict(filter(None, map(buffer, arrays))).values())


def buffer(array: jax.Array) -> tuple[int, int] | None:
    """Address and bytes of an array in device memory; two arrays may share a buffer."""
    try:
        return (array.unsafe_buffer_pointer(), array.nbytes) if array.sharding.memory_kind == "device" else None
    except (RuntimeError, ValueError):  # deleted meanwhile
        return None


def resident(name: str) -> int:
    (found,) = re.findall(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found) << 10


if __name__ == "__main__":
    main()
