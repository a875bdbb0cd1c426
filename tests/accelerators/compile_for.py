"""Compiles what the engine runs on an accelerator for an NVIDIA H200 or a TPU v5e, on a machine that has none.

XLA's compilers for both ask for a description alone. The engine runs plans on CPU devices, of which all but the last stand for
accelerators (as in tests/engine/two_devices.py); each call of a jitted function is recorded with its shapes, dtypes and memory
kinds, and what took arrays of the first accelerator, or of all, is compiled. The first argument is h200, which needs the wheels
jax-cuda13-plugin and jax-cuda13-pjrt of this jax's version on PYTHONPATH, or v5e (four chips) or v5e_8 (eight, for which only runs
of so many are compiled), which need the libtpu that this jax names. The others are names of runs, none for all; those of several
devices need a description of so many.

The last line is JSON: `expert_bytes` of the half-precision runs, `devices` of the description, and `programs`, each with `plan`,
`name`, `temp_bytes`, `waits_for_link` (it copies out of host memory), `collective` (devices exchange something), `divides_rows` and
`failed`, None where it compiled. The plan "control" is one that does wait.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
from typing import Any, NamedTuple
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=9"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no cloud to ask
# As a process on such a machine has them.
os.environ["SPECMOE_GROUPED"] = {"h200": "cuda", "v5e": "tpu", "v5e_8": "tpu"}.get(sys.argv[1], "none")

import jax  # after the flags
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
"""

TARGETS = {
    "h200": {"platform": "cuda", "target_config": H200, "topology": "1x1x1"},
    "v5e": {"platform": "tpu", "topology_name": "v5e:2x2x1"},
    "v5e_8": {"platform": "tpu", "topology_name": "v5e:2x4x1"},
}


class Placed(NamedTuple):
    """An array argument. devices: of the CPU devices; the last is the host. spec: of one on several."""

    shape: tuple[int, ...]
    dtype: Any
    devices: tuple[int, ...]
    spec: PartitionSpec | None
    memory_kind: str
    weak_type: bool


class Placement(SingleDeviceSharding):
    """With a memory kind although a described device says nothing of its memories."""

    def __init__(self, device, memory_kind: str):
        super().__init__(device)
        self.kind = memory_kind

    @property
    def memory_kind(self) -> str:
        return self.kind

    def __eq__(self, other) -> bool:
        return isinstance(other, Placement) and (self._device, self.kind) == (other._device, other.kind)

    def __hash__(self) -> int:
        return hash((self._device, self.kind))


class Call(NamedTuple):
    """leaves: of the arguments that are traced, Placed where they are arrays. static: the others by place, and by name."""

    function: "Recorded"
    leaves: tuple
    tree: Any
    static: tuple[tuple[int, Any], ...]
    named: tuple[tuple[str, Any], ...]


class Recorded:
    """A jitted function that notes how it is called from outside of other programs."""

    calls: dict[Call, None] = {}  # noqa: RUF012 (of all)

    def __init__(self, function, *, static_argnums=(), static_argnames=(), **options):
        self.places = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
        self.names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        self.jitted = _jit(function, static_argnums=static_argnums, static_argnames=static_argnames, **options)
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args, **kwargs):
        traced = [None if i in self.places else arg for i, arg in enumerate(args)]
        leaves, tree = jax.tree.flatten((traced, {name: arg for name, arg in kwargs.items() if name not in self.names}))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            static = tuple((i, args[i]) for i in self.places)
            named = tuple((name, kwargs[name]) for name in sorted(self.names) if name in kwargs)
            self.calls[Call(self, tuple(map(_placed, leaves)), tree, static, named)] = None
        return self.jitted(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.jitted, name)


def _placed(leaf):
    if isinstance(leaf, jax.Array):
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else None
        where = tuple(sorted(device.id for device in leaf.devices()))
        return Placed(leaf.shape, leaf.dtype, where, spec, leaf.sharding.memory_kind, getattr(leaf, "weak_type", False))
    if isinstance(leaf, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def compiled(call: Call, devices) -> dict:
    """What the compiler makes of a call whose arrays are on the accelerator, or on several."""
    from specmoe_jax.types import MESH_AXIS, ShardedPool

    several = next((len(leaf.devices) for leaf in call.leaves if isinstance(leaf, Placed) and len(leaf.devices) > 1), 1)
    mesh = Mesh(np.array(devices[:several]), (MESH_AXIS,))

    def argument(leaf):
        if not isinstance(leaf, Placed):
            return leaf
        # What no device was named for goes to all.
        where = Placement(devices[0], leaf.memory_kind) if several == 1 else NamedSharding(mesh, leaf.spec or PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where, weak_type=leaf.weak_type)

    def on_mesh(value):
        if isinstance(value, Mesh):  # over which a program divides rows
            return mesh
        return dataclasses.replace(value, mesh=mesh) if isinstance(value, ShardedPool) else value

    recorded = jax.tree.unflatten(call.tree, map(argument, call.leaves))
    args, kwargs = jax.tree.map(on_mesh, recorded, is_leaf=lambda value: isinstance(value, ShardedPool))
    for i, value in call.static:
        args[i] = value
    named = {name: on_mesh(value) for name, value in call.named}
    program = call.function.jitted.lower(*args, **kwargs, **named).compile()
    return {
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "waits_for_link": "S(5)" in program.as_text(),  # XLA's name of host memory
        "collective": any(name in program.as_text() for name in ("all-reduce", "all-gather", "reduce-scatter")),
        "divides_rows": any(isinstance(value, Mesh) for _, value in call.named),
    }


def in_one_program() -> None:
    """An expert copied and written by one program, as where the accelerator is the CPU."""
    from specmoe_jax.offload.store import ExpertStore, Link
    from specmoe_jax.offload.tiers import HostTier

    memory = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    block = jax.device_put(np.zeros((3, 8, 16), np.uint16), memory)
    ExpertStore(HostTier(((block,),)), Link()).new_pool(2)


def on_accelerator(call: Call) -> bool:
    """The first one, or all that a plan has."""
    found = {leaf.devices for leaf in call.leaves if isinstance(leaf, Placed)}
    return bool(found) and found <= {(0,), tuple(range(4)), tuple(range(8))}


def described_gpu():
    """From jax 0.11 on Pallas asks the machine which GPU to lower Triton kernels for; here it is told."""
    try:
        gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    except ModuleNotFoundError:  # earlier ones take a Hopper where there is no GPU
        return contextlib.nullcontext()
    return mock.patch.object(gpu_info, "get_gpu_info", lambda: gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H200))


_jit = jax.jit


def recording_jit(function=None, **options):
    return functools.partial(recording_jit, **options) if function is None else Recorded(function, **options)


def main() -> None:
    jax.jit = recording_jit  # before the package is imported: it jits as it is
    from accelerator_runs import EIGHT_RUNS, EXPERT_BYTES, MESH_RUNS, RUNS

    devices = topologies.get_topology_desc(**TARGETS[sys.argv[1]]).devices
    runs = EIGHT_RUNS if len(devices) == 8 else RUNS | (MESH_RUNS if len(devices) == 4 else {}) | {"control": in_one_program}
    runs, found = {name: run for name, run in runs.items() if name in (sys.argv[2:] or runs)}, []
    for plan, run in runs.items():
        Recorded.calls.clear()
        with mock.patch.object(jax, "local_devices", lambda backend=None: jax.devices()[-1:] if backend else jax.devices()):
            run()
        calls = [call for call in Recorded.calls if on_accelerator(call)]
        for call in calls:
            row = {"plan": plan, "name": call.function.__name__, "temp_bytes": None, "waits_for_link": None, "failed": None}
            try:
                with described_gpu():
                    row |= compiled(call, devices)
            except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError) as e:
                row["failed"] = f"{type(e).__name__}: {str(e)[:300]}"
            found.append(row)
        print(f"{plan}: {len(calls)} programs", file=sys.stderr, flush=True)
    print(json.dumps({"expert_bytes": EXPERT_BYTES, "devices": len(devices), "programs": found}))


if __name__ == "__main__":
    main()
