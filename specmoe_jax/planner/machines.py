"""Known machines as data, none of them measured by this project.

`a30` and `4090d`: the table of SpecMoEOff (arXiv 2508.21706), whose link and DRAM rates are the authors'. The others: data sheets
of the accelerator (dense peaks, without sparsity) beside a host that is ASSUMED, as no data sheet says which host a card is in;
cloud instances differ. Where no rate of the link was published, it is 0.8 of the one-way peak of its PCIe generation.
"""

from specmoe_jax.planner.hardware import Efficiency, Hardware
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.units import GIB

TERA, GIGA = 1e12, 1e9

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
        efficiencies=ASSUMED,
        task_s=1e-5,  # assumed as well, like the following
        sync_s=3e-5,
        copy_s=2e-5,
        step_s=2e-3,
    )


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
    # float32 through bfloat16 passes, six of them.
    "tpu_v5e": _machine("TPU v5e, one chip", link=12.8, tflops=(33, 197), memory=(819, 16), cpu=(0.6, 0.6, 60, 48), disk=0.5),
}


def machine(name: str) -> Hardware:
    """A known machine. Raises PlanError for an unknown name."""
    if name not in KNOWN:
        raise PlanError(f"hardware is {name!r}; known are {', '.join(KNOWN)}, or give a JSON file of Hardware.to_json")
    return KNOWN[name]
