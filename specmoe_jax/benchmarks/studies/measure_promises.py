"""The memory that a plan is promised against what its process takes, for presets and tiers; run by hand:

    python -m specmoe_jax.benchmarks.studies.measure_promises --model=DIR [--host_gib=0.5] [--batches=1,8] [--cgroup=FOLDER]

Every case is a process of its own, which loads the model, generates, and tells its account and its own peak. Promised: the account
of accelerator and host (of a CPU both are the process's memory), PROGRAM_BYTES, and what the process takes before it loads a model.
Measured: the peak of anonymous memory, since file pages that are mapped or read give way. --cgroup: a folder of a control group
(version 1 or 2) that this user may write to; each case then runs again in a group below it, limited to 1.05 of what was promised,
so a broken promise is a killed process.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from specmoe_jax.benchmarks.peak import Peak
from specmoe_jax.support.host_memory import anonymous_bytes

PRESETS = ("resident", "host_compute", "on_demand", "caching", "specmoe", "streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--host_gib", type=float, default=0.5, help="of the disk tier")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--cgroup", help="a writable memory control group")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the process of one case
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options, **json.loads(options.case))), flush=True)
        return
    print(f"{'preset':<14}{'tier':<6}{'batch':>6}{'promised MiB':>14}{'measured':>10}  ratio")
    for preset in options.presets.split(","):
        for tier in ("host", "disk"):
            if tier == "disk" and preset in ("resident", "host_compute"):
                continue
            for batch in map(int, options.batches.split(",")):
                report(options, {"preset": preset, "tier": tier, "batch": batch})


def report(options: argparse.Namespace, case: dict[str, Any]) -> None:
    row = f"{case['preset']:<14}{case['tier']:<6}{case['batch']:>6}"
    ran = in_process(options, case, limit=None)
    if not isinstance(ran, dict):
        print(f"{row}  {ran}", flush=True)
        return
    promised, peak = ran["promised"], ran["peak"]
    print(f"{row}{promised / 2**20:>14.0f}{peak / 2**20:>10.0f}  {peak / promised:.3f}", flush=True)
    if options.cgroup:
        again = in_process(options, case, limit=int(1.05 * promised))
        print(f"{'':<26}within 1.05 of it: {'done' if isinstance(again, dict) else again}", flush=True)


def in_process(options: argparse.Namespace, case: dict[str, Any], limit: int | None) -> dict | str:
    """What the case told, or how it ended."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *sys.argv[1:], f"--case={json.dumps(case)}"]
    group = None if limit is None else limited(pathlib.Path(options.cgroup), limit)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=joining(group))
    if group is not None:
        group.rmdir()
    if ran.returncode:
        return f"exit {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1][:150]}"
    return json.loads(ran.stdout.splitlines()[-1])


def joining(group: pathlib.Path | None) -> Callable[[], object] | None:
    """What a process does before it runs, so that the group counts all of it; None without a group."""
    return None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))


def limited(parent: pathlib.Path, limit: int) -> pathlib.Path:
    group = parent / f"specmoe-{os.getpid()}"
    group.mkdir()
    file = next(group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
    file.write_text(str(limit))
    return group


def run(options: argparse.Namespace, *, preset: str, tier: str, batch: int) -> dict[str, float]:
    """In a process of its own."""
    import numpy as np

    import specmoe_jax as sm
    import specmoe_jax.engine  # so that its modules count as the process
    from specmoe_jax.planner.memory.memory_account import PROGRAM_BYTES

    specmoe_jax.engine.Engine  # noqa: B018 (lazy)
    with Peak(anonymous) as peak:
        before = anonymous()
        model = sm.load_model(options.model, dtype=options.dtype, expert_tier=tier)
        name = "resident" if preset == "host_compute" else preset
        plan = sm.PRESETS[name](model.config).replace(batch_size=batch, dtype=options.dtype, expert_tier=tier)
        if preset == "host_compute":
            plan = plan.replace(expert_flow="host_compute")
        if tier == "disk":
            plan = plan.replace(host_memory_bytes=int(options.host_gib * 2**30))
        engine = sm.Engine(model, plan)
        prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, size=(batch, 32)).tolist()
        engine.generate(prompts, sm.SamplingParams(max_new_tokens=options.tokens, ignore_eos=True))
        account = engine._resources.account
    assert account is not None  # of the job that has run
    mapped = 0 if tier == "disk" or not is_mapped(model) else account.host_expert_bytes
    return {"promised": before + PROGRAM_BYTES + account.accelerator_bytes + account.host_bytes - mapped, "peak": peak.most}


def is_mapped(model) -> bool:
    """Whether the experts are pages of files."""
    address = model.experts[0][0].unsafe_buffer_pointer()
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.rstrip().endswith(".safetensors")
    return False


def anonymous() -> int:
    """anonymous_bytes, where they can be told."""
    found = anonymous_bytes()
    assert found is not None
    return found


if __name__ == "__main__":
    main()
