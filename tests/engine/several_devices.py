"""Plans for several devices, on four CPU devices in a process of its own. Run by test_several_devices.py; the last line is JSON.

Arguments: names of PLANS. Of each the tokens with one device and with others, and the bytes over each link: as the store counted
them, and by the experts that left host memory.
"""

import json
import sys

import jax
import numpy as np
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, tokens_of

import specmoe_jax as sm
from specmoe_jax.engine import runtime
from specmoe_jax.engine.step import moved
from specmoe_jax.offload.homes import most_experts
from specmoe_jax.offload.sharded_store import ShardedStore
from specmoe_jax.offload.store import Link
from specmoe_jax.offload.tiers import HostTier
from specmoe_jax.testing import eagle_head, tiny
from specmoe_jax.types import MESH_AXIS

SHORT = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
COUPLED = {"deterministic_sampling": True}

# name -> plan, parameters, numbers of devices
PLANS = {
    "on_demand": (plan("on_demand", batch_size=8), GREEDY, (2, 4)),
    "specmoe": (plan("specmoe", batch_size=8, prefetch="draft"), GREEDY, (4,)),
    "streaming": (plan("streaming", batch_size=4, micro_batches=2, pinned_layers=1), GREEDY, (2, 4)),
    "one row": (plan("specmoe", batch_size=1, retain=True, prefetch="draft", spare_slots=1), SHORT, (2, 4)),
    "caching": (plan("caching", batch_size=8, retain=True), GREEDY, (2, 4)),
    "waves": (plan("on_demand", batch_size=8, device_memory_bytes=5.3e5), SHORT, (2,)),
    "resident": (plan("resident", batch_size=8), GREEDY, (4,)),
    "host": (plan("specmoe", batch_size=8, kv_tier="host"), GREEDY, (2,)),
    "ngram": (plan("on_demand", batch_size=8, draft="ngram", draft_length=3), GREEDY, (4,)),
    "sampled": (plan("on_demand", batch_size=8), SAMPLED, (4,)),
    "coupled": (plan("specmoe", batch_size=8, **COUPLED), SAMPLED, (4,)),
    "eagle": (plan("specmoeoff", batch_size=4, draft_length=3, prefill_attention="accelerator"), SHORT, (2,)),
    "tree": (plan("specmoeoff", batch_size=4, draft_length=3, draft_tree_top_k=2, draft_tree_tokens=4), SHORT, (4,)),
    "model": (plan("on_demand", batch_size=8, draft="model", draft_length=3), SHORT, (4,)),
}


class CountingTier(HostTier):
    """Counts how often each expert [E] left host memory."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = np.zeros(self.num_experts // self.num_layers, np.int64)

    def blocks(self, keys):
        np.add.at(self.left, [expert for _, expert in keys], 1)
        return super().blocks(keys)


def outcome(a_plan, params) -> dict:
    """Of a job with a plan."""
    given = {"eagle": {"draft_head": eagle_head(tiny())}, "model": {"draft_model": tiny()}}.get(a_plan.draft, {})
    engine = sm.Engine(tiny(), a_plan, **given)
    tokens = tokens_of(engine.generate(PROMPTS, params))
    stats, own = engine.stats(), engine._resources.runtime
    assert stats["compilations_after_warmup"] == 0
    size, left = own.experts.expert_bytes, own.experts.store.tier.left
    zeros = size * (a_plan.expert_flow != "stream")  # a pool is warmed up by one block
    wanted = [int(left[device :: a_plan.devices].sum()) * size + zeros for device in range(a_plan.devices)]
    return {
        "tokens": tokens,
        "sent": moved(own).device_bytes.tolist(),
        "wanted": wanted,
        "decoding": stats["device_link_bytes"],
        "link_bytes": stats["link_bytes"],
        "balance": stats["link_balance"],
    }


def lanes() -> list[float]:
    """Blocks for which each of four links is busy when each was given three, the first of them to warm up."""
    devices, block_s, own = jax.local_devices(), 100.0, most_experts(4, 5)
    mesh = jax.sharding.Mesh(np.array(devices), (MESH_AXIS,))
    links = [Link(bytes_per_s=tiny().expert_bytes / block_s) for _ in devices]
    store, slots = ShardedStore(HostTier(tiny().experts, devices), links, mesh), 3 * own
    store.fetch(store.new_pool(4 * slots), [(layer, expert, expert * slots + layer) for layer in range(2) for expert in range(4)])
    return [link.backlog_s / block_s for link in links]


def main() -> None:
    runtime.HostTier = CountingTier
    found = {}
    for name in sys.argv[1:] or PLANS:
        a_plan, params, counts = PLANS[name]
        found[name] = {count: outcome(a_plan.replace(devices=count), params) for count in (1, *counts)}
    print(json.dumps({"plans": found, "lanes": lanes()}))


if __name__ == "__main__":
    main()
