"""Plans in two processes of two CPU devices each. Run by test_processes.py, twice; the last line is JSON.

Arguments: the port of the first process, the number of this one, names of PLANS. Of each plan the outcome of several_devices.py,
where `wanted` is right for the devices of this process; and which experts of a checkpoint it holds.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from engine_cases import GREEDY, PROMPTS, plan, tokens_of
from several_devices import PLANS as ALONE
from several_devices import SHORT, CountingTier, outcome

import specmoe_jax as sm
from specmoe_jax.engine import runtime
from specmoe_jax.models import mtp
from specmoe_jax.support import processes
from specmoe_jax.testing import write_tiny
from specmoe_jax.testing.families import tiny_family

PLANS = {name: (a_plan, params) for name, (a_plan, params, _) in ALONE.items()} | {
    "guard": (plan("specmoe", batch_size=8, guard=True), GREEDY),
    "merged": (plan("specmoe", batch_size=8, draft="merged", draft_experts=2, draft_length=2), SHORT),
    "ngram": (plan("on_demand", batch_size=8, draft="ngram", draft_length=3), SHORT),
}
MTP = ("mtp", "mtp hot")
"""Beside PLANS: a model that ships a layer for further tokens, all of its experts on the accelerator or a few."""


def mtp_tokens(name: str, devices: int, num_processes: int) -> list[tuple[int, ...]]:
    model, hot = tiny_family("glm4_moe"), name != "mtp"
    own = sm.PRESETS["on_demand"](model.config).replace(
        draft="mtp",
        draft_length=2,
        draft_experts=4 if hot else None,
        batch_size=8,
        devices=devices,
        num_processes=num_processes,
    )
    prompts = [[token % model.config.vocab_size for token in prompt] for prompt in PROMPTS]
    return tokens_of(sm.Engine(model, own, mtp_head=mtp.random_head(model, experts_on_host=hot)).generate(prompts, SHORT))


def held(folder: str) -> list[list[bool]]:
    """[L, E], what this process keeps of a checkpoint for four devices; it still finds the other experts."""
    write_tiny(pathlib.Path(folder))
    model, whole = sm.load_model(folder, devices=4), sm.load_model(folder)
    for layer, everything in zip(model.experts, whole.experts, strict=True):
        assert all(map(np.array_equal, layer, everything))
    return [[block is not None for block in layer.held] for layer in model.experts]


def main() -> None:
    port, number, *names = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), cluster_detection_method="deactivate")
    runtime.HostTier, found = CountingTier, {}
    with tempfile.TemporaryDirectory() as folder:
        kept = held(folder)
        for name in names:
            if name in MTP:
                found[name] = {"tokens": mtp_tokens(name, 4, 2)}
                continue
            a_plan, params = PLANS[name]
            found[name] = outcome(a_plan.replace(devices=4, num_processes=2), params, folder)
    told = {"agreed": processes.agreed(1.5 + int(number)), "differing": processes.differing({"same": b"1", "own": number.encode()})}
    print(json.dumps({"plans": found, "held": kept, "bytes": processes.agreed_bytes(number.encode()).decode()} | told))


if __name__ == "__main__":
    main()
