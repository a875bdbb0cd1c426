"""The figures of a run as a table for people."""

import textwrap

from specmoe_jax.cli.shown.wrapped_text import WIDTH

CERTAIN = 1.05  # share of a bound beyond which it was none


def table(stats: dict) -> str:
    """The closing table of a run, for people."""
    rows = [
        ("decode", f"{_number(stats['decode_tokens_per_s'])} tokens/s, {stats['new_tokens']} tokens in {stats['steps']} steps"),
        ("decode, full batches alone", f"{_number(stats['full_batch_tokens_per_s'])} tokens/s"),
        ("tokens per step", _number(stats["tokens_per_step"])),
        ("accepted by position", "  ".join(f"{share:.2f}" for share in stats["acceptance_by_position"]) or "no draft"),
        ("link, expert bytes/token", _link_row(stats)),
        ("experts resident / absent", f"{stats['expert_hits']} / {stats['expert_misses']}"),
        ("expert bytes while drafting", str(stats["draft_link_bytes"])),
        ("link, activation bytes", str(stats["activation_link_bytes"])),
        ("accelerator / host peak", f"{_mebi(stats['peak_accelerator_bytes'])} / {_mebi(stats['peak_host_bytes'])} MiB"),
        ("prompts", f"{_number(stats['prefill_tokens_per_s'])} tokens/s"),
        ("load, compile, prefill", "  ".join(f"{stats[name]:.2f} s" for name in ("load_s", "compile_s", "prefill_s"))),
        ("compilations after warm-up", str(stats["compilations_after_warmup"])),
    ]
    if stats["host_computed_experts"]:
        rows.insert(6, ("of them on the host's cores", str(stats["host_computed_experts"])))
    if stats["device_rows"]:
        own, every = stats["device_rows"]
        whole = f"all {every}, no multiple of {stats['plan']['devices']} devices"
        rows.append(("rows of each device", whole if own == every else f"{own} of {every}"))
    if stats["draft_cpu_row_share"]:
        share, moves = stats["draft_cpu_row_share"], stats["draft_moves"]
        rows.append(("draft caches on the CPU", f"{share:.1%} of the rows' steps, {moves} moves"))
    if stats["plan"]["expert_tier"] == "disk" and stats["dram_hits"] + stats["dram_misses"]:  # else the system reads
        rows.append(("disk bytes/token", _number(stats["disk_bytes_per_token"])))
        rows.append(("host cache hits / misses", f"{stats['dram_hits']} / {stats['dram_misses']}"))
    if (share := stats["fraction_of_floor"]) is not None:
        more = ": above 1 caches help, or the machine was busy when it was measured" if share > CERTAIN else ""
        rows.append(("share of the floor", f"{share:.2f} of what the {stats['binding_resource'] or 'link'} allows{more}"))
    if "rates" in stats:
        rows.append(("rates reached", _rates_row(stats["rates"])))
    if "predicted" in stats:
        rows.append(("step predicted / measured", f"{_milli(stats['predicted']['step_s'])} / {_milli(stats['step_s'])} ms"))
    if "quantised_kl" in stats:
        kl, top1, positions = (stats[f"quantised_{name}"] for name in ("kl", "top1", "positions"))
        error = f"KL {kl:.1e} nats from {stats['plan']['dtype']}, same top token at {top1:.1%} of {positions} positions"
        rows.append((_quantised_row(stats["plan"]), error))
    if stats["synthetic"]:
        rows.append(("SYNTHETIC", f"{', '.join(stats['synthetic'])}: emulated, not this machine's"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(line for name, value in rows for line in _lines(name, value, width))


def _lines(name: str, value: str, width: int) -> list[str]:
    """In 80 columns; what a row has beyond them goes on below, as it is spaced."""
    first, *more = textwrap.wrap(value, WIDTH - width - 2, drop_whitespace=True, break_on_hyphens=False) or [""]
    return [f"{name:<{width}}  {first}", *(f"{'':<{width}}  {line.strip()}" for line in more)]


def _link_row(stats: dict) -> str:
    spent, plain = stats["link_bytes_per_token"], stats["on_demand_link_bytes_per_token"]
    if not plain:
        return _number(spent)
    return f"{_number(spent)}, on_demand {_number(plain)}: {spent / plain:.2f} of it"


def _rates_row(rates: dict) -> str:
    """Decimal units, as those of Hardware."""
    units = {"link_bytes_per_s": "link", "cache_bytes_per_s": "cache reads", "weight_bytes_per_s": "weights"}
    shown = [f"{name} {rates[key] / 1e9:.3g} GB/s" for key, name in units.items() if key in rates]
    return "  ".join([*shown, f"{rates['flops_per_s'] / 1e9:.3g} GFLOP/s"]) if rates else "-"


def _milli(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _mebi(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / (1 << 20):,.0f}"


def _quantised_row(plan: dict) -> str:
    named = {"experts": plan["expert_dtype"], "dense": plan["dense_dtype"]}
    return ", ".join(f"{what} in {dtype}" for what, dtype in named.items() if dtype)
