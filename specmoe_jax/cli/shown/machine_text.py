"""A machine's figures for people, in 80 columns; docs/machines.md has them all."""

from specmoe_jax.planner.hardware import Hardware


def machine_text(hardware: Hardware) -> str:
    """A line a resource: peak rates and sizes."""
    h = hardware
    accelerator = f"{_tera(h.accelerator_flops_bfloat16)} TFLOP/s bfloat16, {_tera(h.accelerator_flops_float32)} float32"
    cpu = f"{_tera(h.cpu_flops_bfloat16)} TFLOP/s bfloat16, {_tera(h.cpu_flops_float32)} float32"
    rows = [
        ("machine", h.name if h.measured else f"{h.name} (data sheets and assumptions)"),
        ("link", f"{_giga(h.up_bytes_per_s)} GB/s to the accelerator, {_giga(h.down_bytes_per_s)} back"),
        ("accelerator", f"{accelerator}, {_giga(h.accelerator_bytes_per_s)} GB/s, {_gibi(h.accelerator_memory_bytes)} GiB"),
        ("CPU", f"{cpu}, {_giga(h.dram_bytes_per_s)} GB/s, {_gibi(h.host_memory_bytes)} GiB"),
        ("disk", f"{_giga(h.disk_bytes_per_s)} GB/s"),
    ]
    return "\n".join(f"{name:<11}  {text}" for name, text in rows)


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.3g}" if rate < 1e12 else f"{rate / 1e9:,.0f}"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:,.3g}" if rate < 1e15 else f"{rate / 1e12:,.0f}"


def _gibi(size: float) -> str:
    return f"{size / 2**30:,.0f}"
