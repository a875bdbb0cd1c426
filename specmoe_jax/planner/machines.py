"""Known machines as data, none of them measured by this project.

`a30` and `4090d`: the table of SpecMoEOff (arXiv 2508.21706), whose link and DRAM rates are the authors'. The others: data sheets
of the accelerator (dense peaks with float32 sums, no sparsity) with an ASSUMED host, because no data sheet says which host a
card is in; cloud instances differ. Where no link rate was published, it is 0.8 of the one-way peak of PCIe (or NVLink-C2C). Between
accelerators it is 0.8 of the one-way peak of NVLink or of a TPU's interconnect, or the link's own rate where they have none.
A machine without an accelerator computes on its CPU: its "link" is a memcpy, a quarter of its memory's rate (assumed).
"""

import dataclasses
import difflib
import json
from typing import Any, NamedTuple

from specmoe_jax.planner.hardware import Efficiency, Hardware
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.units import GIB

TERA, GIGA = 1e12, 1e9
# Figures of Hardware: unit, and what each is; docs/machines.md is made of them.
FIGURES = {
    "name": ("text", "what it is called"),
    "up_bytes_per_s": ("bytes/s", "link, host memory to accelerator"),
    "down_bytes_per_s": ("bytes/s", "link, accelerator to host memory"),
    "accelerator_flops_float32": ("flop/s", "peak of the accelerator's matrix products in float32"),
    "accelerator_flops_bfloat16": ("flop/s", "the same in bfloat16, float32 sums, no sparsity"),
    "accelerator_bytes_per_s": ("bytes/s", "the accelerator's memory"),
    "accelerator_memory_bytes": ("bytes", "its size"),
    "cpu_flops_float32": ("flop/s", "peak of the CPU in float32"),
    "cpu_flops_bfloat16": ("flop/s", "the same in bfloat16"),
    "dram_bytes_per_s": ("bytes/s", "host memory"),
    "host_memory_bytes": ("bytes", "its size"),
    "disk_bytes_per_s": ("bytes/s", "sequential reads of the disk"),
    "task_s": ("s", "of one program dispatched to the accelerator"),
    "sync_s": ("s", "of one wait of the host for it"),
    "copy_s": ("s", "of one copy, whatever its size"),
    "step_s": ("s", "of one step on the host: acceptance, requests, bookkeeping"),
    "peer_bytes_per_s": ("bytes/s", "between two accelerators, each way"),
    "devices": ("whole number", "accelerators alike, each with its own memory and link"),
    "network_bytes_per_s": ("bytes/s", "between a machine and others like it, each way"),
    "hosts": ("whole number", "machines alike that hold the devices; `host_memory_bytes` is of all of them"),
    "accelerator_is_cpu": ("true or false", "no accelerator: its tasks and the CPU's add up instead of overlapping"),
    "overlap": ("share", "of a transfer that hides behind computation of the same length"),
    "measured": ("true or false", "by the probe, not from data sheets"),
    "efficiencies": ("object", "by operator (dense, experts, ...): compute and memory, shares of the peaks, and overhead_s"),
    "spreads": ("object", "relative half-width of a rate or of an operator's time, for the interval of a prediction"),
}  # fmt: skip
DEFAULT = "4090"  # whose figures stand for those that a machine file leaves out

# One share of the peak for each kind of operator, the same for every machine here; assumed, not fitted to any result:
# half of the peak for matrix products; a third for attention on the CPU, which is what oneMKL's batched products (SpecMoEOff's
# way) reached on this project's development machines; 0.8 of a memory's rate.
ASSUMED = (
    ("dense", Efficiency(compute=0.5, memory=0.8)),
    ("experts", Efficiency(compute=0.5, memory=0.8)),
    ("attention", Efficiency(compute=0.3, memory=0.8)),
    ("cpu_attention", Efficiency(compute=0.33, memory=0.8)),
)


def _machine(name, *, link, tflops, memory, cpu, disk=3.0) -> Hardware:
    """link, disk: GB/s. tflops: float32, bfloat16. memory: GB/s, GiB. cpu: TFLOP/s float32 and bfloat16, DRAM GB/s, GiB."""
    return Hardware(
        name=name,
        up_bytes_per_s=link * GIGA,
        down_bytes_per_s=link * GIGA,
        accelerator_flops_float32=tflops[0] * TERA,
        accelerator_flops_bfloat16=tflops[1] * TERA,
        accelerator_bytes_per_s=memory[0] * GIGA,
        accelerator_memory_bytes=memory[1] * GIB,
        cpu_flops_float32=cpu[0] * TERA,
        cpu_flops_bfloat16=cpu[1] * TERA,
        dram_bytes_per_s=cpu[2] * GIGA,
        host_memory_bytes=cpu[3] * GIB,
        disk_bytes_per_s=disk * GIGA,
        peer_bytes_per_s=link * GIGA,
        efficiencies=ASSUMED,
        task_s=1e-5,  # assumed as well, like the following
        sync_s=3e-5,
        copy_s=2e-5,
        step_s=2e-3,
    )


def _cpu(name, *, tflops, memory, disk=3.0) -> Hardware:
    """No accelerator. tflops: float32, bfloat16. memory: GB/s, GiB."""
    own = _machine(name, link=memory[0] / 4, tflops=tflops, memory=memory, cpu=(*tflops, *memory), disk=disk)
    return own.replace(accelerator_is_cpu=True, peer_bytes_per_s=0.0)


# The paper gives one CPU peak, taken for both dtypes: these kernels convert and multiply in float32.
KNOWN = {
    "a30": _machine("A30 + Xeon 6426Y", link=25, tflops=(10.3, 165), memory=(933, 24), cpu=(2.43, 2.43, 357, 250)),
    "4090d": _machine("RTX 4090D + Xeon 5418Y", link=23, tflops=(73.5, 83), memory=(1008, 24), cpu=(1.45, 1.45, 197, 190)),
    # SpecMoE's machine: 96 GB, PCIe 5, 1 TB of DDR5; the CPU is assumed.
    "h100": _machine("H100 96 GB", link=51, tflops=(67, 989), memory=(3350, 89), cpu=(3.0, 3.0, 250, 930)),
    "h200": _machine("H200 141 GB", link=51, tflops=(67, 989), memory=(4800, 131), cpu=(3.0, 3.0, 250, 930)),
    "l4": _machine("L4 24 GB", link=25.6, tflops=(30.3, 121), memory=(300, 22), cpu=(0.6, 0.6, 50, 64), disk=1.0),
    # A T4 has no bfloat16 units; its float32 peak stands for both.
    "t4": _machine("T4 16 GB", link=12.8, tflops=(8.1, 8.1), memory=(320, 15), cpu=(0.4, 0.4, 40, 64), disk=0.5),
    "3090": _machine("RTX 3090 24 GB", link=25.6, tflops=(35.6, 71), memory=(936, 24), cpu=(0.8, 0.8, 50, 64)),
    "4090": _machine("RTX 4090 24 GB", link=25.6, tflops=(82.6, 165), memory=(1008, 24), cpu=(1.0, 1.0, 60, 64)),
    "5090": _machine("RTX 5090 32 GB", link=51, tflops=(104.8, 209), memory=(1792, 32), cpu=(1.2, 1.2, 70, 96)),
    "a100": _machine("A100 80 GB", link=25.6, tflops=(19.5, 312), memory=(2039, 79), cpu=(2.0, 2.0, 160, 480)),
    "a6000": _machine("RTX A6000 48 GB", link=25.6, tflops=(38.7, 155), memory=(768, 47), cpu=(1.0, 1.0, 80, 128)),
    "l40s": _machine("L40S 48 GB", link=25.6, tflops=(91.6, 362), memory=(864, 45), cpu=(1.5, 1.5, 150, 256)),
    "b200": _machine("B200 192 GB", link=51, tflops=(75, 2250), memory=(8000, 180), cpu=(3.0, 3.0, 250, 930)),
    # NVLink-C2C: 450 GB/s one way; Grace: 72 cores, LPDDR5X.
    "gh200": _machine("GH200, 96 GB", link=360, tflops=(67, 989), memory=(4000, 95), cpu=(7.0, 7.0, 384, 470)),
    # float32 through bfloat16 passes, six of them. Hosts: the share of one chip of a cloud machine.
    "tpu_v5e": _machine("TPU v5e, one chip", link=12.8, tflops=(33, 197), memory=(819, 16), cpu=(0.6, 0.6, 60, 48), disk=0.5),
    "tpu_v6e": _machine("TPU v6e, one chip", link=25.6, tflops=(153, 918), memory=(1640, 32), cpu=(1.0, 1.0, 80, 176), disk=0.5),
    "tpu_v7x": _machine("TPU v7x, one chip", link=51, tflops=(385, 2307), memory=(7370, 192), cpu=(1.5, 1.5, 120, 240), disk=0.5),
    # CPUs alone: cores x clock x 32 flops (NEON) or 64 (AVX-512), which JAX reaches in float32; no units for bfloat16 on Apple's.
    "m4_max": _cpu("Apple M4 Max", tflops=(1.7, 1.7), memory=(546, 128), disk=6.0),
    "m3_ultra": _cpu("Apple M3 Ultra", tflops=(3.0, 3.0), memory=(819, 512), disk=6.0),
    "epyc_9654": _cpu("EPYC 9654, one socket", tflops=(7.4, 14.7), memory=(460, 768)),
}

# NVLink, or a TPU's interconnect, GB/s each way; others reach each other over their links.
_PEERS = {"h100": 360, "h200": 360, "b200": 720, "a100": 240, "tpu_v5e": 160, "tpu_v6e": 320, "tpu_v7x": 480}
KNOWN |= {name: KNOWN[name].replace(peer_bytes_per_s=rate * GIGA) for name, rate in _PEERS.items()}


def _host(name: str, like: str, *, network: float, memory: tuple[float, float]) -> Hardware:
    """Eight of an accelerator. network: GB/s, of a host. memory: GB/s, GiB."""
    dram = {"dram_bytes_per_s": memory[0] * GIGA, "host_memory_bytes": memory[1] * GIB}
    return KNOWN[like].replace(name=name, devices=8, network_bytes_per_s=network * GIGA, **dram)


# H100: eight network cards of 400 Gbit/s, two sockets. TPUs: eight times the share of a chip; the hosts of a slice reach each other
# over half of their chips' interconnect (assumed).
KNOWN |= {
    "h100_host": _host("eight H100 80 GB", "h100", network=320, memory=(500, 1860)).replace(accelerator_memory_bytes=79 * GIB),
    "tpu_v5e_host": _host("eight TPU v5e", "tpu_v5e", network=640, memory=(480, 384)),
    "tpu_v6e_host": _host("eight TPU v6e", "tpu_v6e", network=1280, memory=(640, 1408)),
}


def machine(name: str) -> Hardware:
    """A known machine. Raises PlanError for an unknown name, with the nearest one."""
    if name not in KNOWN:
        near = difflib.get_close_matches(name.lower().replace("-", "_").replace("rtx", ""), KNOWN, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else ";"
        raise PlanError(f"hardware is {name!r}{meant} known are {', '.join(KNOWN)}, or give a JSON file (docs/machines.md)")
    return KNOWN[name]


class MachineFile(NamedTuple):
    """hardware: of a file. like, taken: the known machine whose figures stand for those that the file does not give, and which."""

    hardware: Hardware
    like: str
    taken: tuple[str, ...]


def read_machine(text: str) -> MachineFile:
    """A JSON object with some or all figures of Hardware; "like" names the known machine that gives the others (default: 4090).

    Raises PlanError.
    """
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PlanError(f"the hardware is not JSON ({e}); docs/machines.md lists its figures") from e
    if not isinstance(raw, dict):
        raise PlanError("the hardware is no JSON object; docs/machines.md lists its figures")
    given = {name: value for name, value in raw.items() if name != "like"}
    required = [field.name for field in dataclasses.fields(Hardware) if field.default is dataclasses.MISSING]
    if "like" not in raw and all(name in given for name in required):
        return MachineFile(Hardware.from_json(text), "", ())
    like = raw.get("like", DEFAULT)
    base = json.loads(machine(str(like)).to_json()) | {"name": f"a machine like {like}"}
    taken = tuple(name for name in required if name not in given and name != "name")
    return MachineFile(Hardware.from_json(json.dumps(base | given)), str(like), taken)
